"""Print update graphs as the Python that a person would write for that network."""

from __future__ import annotations

import builtins
import operator
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kfc_fx.codegen.text.expressions import ATOM, PRECEDENCE, UNARY, WIDTH, Expression, broken
from kfc_fx.codegen.text.update_graph import (
    UpdateGraph,
    complements,
    complements_of_powers,
    entries_at,
    merged,
    values_at,
)

INFIX: dict[Callable[..., Any], str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.matmul: "@",
    operator.pow: "**",
    operator.or_: "|",
}
NAMESPACES = {"torch": torch, "torch.linalg": torch.linalg}
"""What the functions of torch are printed by: the shortest public name."""


def print_function(update: UpdateGraph, indent: int = 0) -> tuple[list[str], dict[str, str]]:
    """Source of an update graph, and of the functions within it.

    Returns:
        The lines of the function, and the names it imports by the module they come from.
    """
    printer = _Printer(indent + 4)
    pad = " " * (indent + 4)
    body = printer.body(update.graph)
    arguments = tuple(Expression(name) for name in update.arguments)
    lines = broken(Expression(f"def {update.name}(", arguments, "):"), indent)
    if update.summary:
        lines += docstring(update.summary, indent + 4)
    for section, inners in update.sections.items():
        for number, inner in enumerate(inners):
            text, imports = print_function(inner, indent + 4)
            printer.imports |= imports
            lines += ["", *([] if number else comment_lines(section, pad)), *text]
    return lines + [""] * bool(update.summary) + body, printer.imports


def docstring(summary: str, indent: int) -> list[str]:
    """Lines of a docstring, its paragraphs filled anew."""
    pad = " " * indent
    first, *rest = summary.split("\n\n")
    width = WIDTH - indent
    wrapped = [textwrap.wrap('"""' + first + '"""' * (not rest), width)]
    wrapped += [textwrap.wrap(paragraph, width) for paragraph in rest]
    lines = "\n\n".join("\n".join(pad + line for line in lines) for lines in wrapped).split("\n")
    return lines + [f'{pad}"""'] * bool(rest)


def comment_lines(text: str, pad: str) -> list[str]:
    """A comment, on as many lines as it takes; names are not broken."""
    width = WIDTH - len(pad) - len("# ")
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [f"{pad}# {line}" for line in lines]


class _Printer:
    def __init__(self, indent: int) -> None:
        self.indent = indent
        self.imports: dict[str, str] = {}
        self.inlined: dict[fx.Node, Expression] = {}
        self.forms: dict[Any, Callable[..., Expression]] = {
            operator.getitem: self.entry,
            operator.neg: self.negative,
            getattr: self.attribute,
            list: self.listed,
            tuple: self.value,
            merged: self.union,
            values_at: lambda mapping, names: self.lookups(mapping, names, ""),
            entries_at: lambda mapping, keys, name: self.lookups(mapping, keys, f'["{name}"]'),
            complements: lambda shares: self.comprehension("1 - each", shares),
            complements_of_powers: self.powers,
        }

    def body(self, graph: fx.Graph) -> list[str]:
        lines: list[str] = []
        for node in graph.nodes:
            if node.op == "placeholder" or "unpacked" in node.meta:
                continue
            if node.op == "output":
                lines += self.output(node)
            elif _is_returned_at_once(node):
                self.inlined[node] = self.node(node)
            elif "statement" in node.meta or (_occurrences(node) > 1 and not _is_lookup(node)):
                if "section" in node.meta:
                    lines += [""] * bool(lines)
                    lines += comment_lines(node.meta["section"], " " * self.indent)
                lines += self.statement(node)
            else:
                self.inlined[node] = self.node(node)
        return lines

    def statement(self, node: fx.Node) -> list[str]:
        expression = self.node(node)
        if "effect" in node.meta:
            return broken(expression, self.indent)
        comment = node.meta.get("comment", "")
        targets = [part.name for part in node.meta.get("unpack", ())] or [node.name]
        prefix = f"{', '.join(targets)} = "
        if len(prefix) + len(expression.head) > WIDTH - 8 and len(targets) > 1:
            names = tuple(Expression(name) for name in targets)
            *first, last = broken(Expression("(", names, ") ="), self.indent, force=True)
            begin, *rest = broken(expression, self.indent, comment)
            return [*first, f"{last} {begin.strip()}", *rest]
        return broken(expression.labelled(prefix), self.indent, comment)

    def output(self, node: fx.Node) -> list[str]:
        value = node.args[0]
        comment = value.meta.get("comment", "") if isinstance(value, fx.Node) else ""
        return broken(self.returned(value).labelled("return "), self.indent, comment)

    def returned(self, value: Any) -> Expression:
        """A tuple without its brackets, where that fits on a line."""
        expression = self.value(value)
        flat = isinstance(value, tuple) and len(value) > 1
        if flat and self.indent + len("return ") + len(expression.flat) - 2 <= WIDTH:
            return Expression(expression.flat[1:-1])
        return expression

    def value(self, value: Any) -> Expression:
        if isinstance(value, fx.Node):
            return self.inlined.get(value, Expression(value.name))
        if isinstance(value, list | tuple):
            opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
            if isinstance(value, tuple) and len(value) == 1:
                closing = ",)"
            return Expression(opening, tuple(self.value(v) for v in value), closing)
        if isinstance(value, dict):
            items = [self.value(v).labelled(f"{_literal(key)}: ") for key, v in value.items()]
            return Expression("{", tuple(items), "}")
        if isinstance(value, slice):
            return Expression(f"{_bound(value.start)}:{_bound(value.stop)}")
        return Expression(_literal(value))

    def node(self, node: fx.Node) -> Expression:
        if node.op == "call_method":
            owner, *args = node.args
            link = self.call(f".{node.target}", args, node.kwargs)
            return self.owner(owner).linked(link)
        if node.op == "call_module":
            return self.call(str(node.target), node.args, node.kwargs)
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        if target in INFIX:
            return self.infix(INFIX[target], *node.args)
        if target in self.forms:
            return self.forms[target](*node.args)
        return self.call(self.function_name(target), node.args, node.kwargs)

    # -- forms of expressions ------------------------------------------------------------

    def entry(self, owner: Any, index: Any) -> Expression:
        parts = index if isinstance(index, tuple) else (index,)
        return self.owner(owner).subscripted(", ".join(self.value(part).flat for part in parts))

    def attribute(self, owner: Any, name: str) -> Expression:
        return self.owner(owner).linked(Expression(f".{name}"))

    def negative(self, value: Any) -> Expression:
        expression = self.value(value)
        if expression.precedence < UNARY:
            expression = expression.in_brackets()
        return replace(expression.labelled("-"), precedence=UNARY)

    def listed(self, values: Any) -> Expression:
        if isinstance(values, fx.Node):
            return self.call("list", [values], {})
        return self.value(list(values))

    def union(self, *mappings: Any) -> Expression:
        return Expression("{", tuple(self.value(m).labelled("**") for m in mappings), "}")

    def lookups(self, mapping: Any, names: Any, entry: str) -> Expression:
        each = f"{self.owner(mapping).flat}[name]{entry} for name in {self.value(names).flat}"
        return Expression("[", (Expression(each),), "]")

    def comprehension(self, each: str, values: Any) -> Expression:
        return Expression("[", (Expression(f"{each} for each in {self.value(values).flat}"),), "]")

    def powers(self, values: Any, count: Any) -> Expression:
        exponent = self.operand(count, "**", PRECEDENCE["**"] + 1).flat
        return self.comprehension(f"1 - each**{exponent}", values)

    def infix(self, sign: str, left: Any, right: Any) -> Expression:
        level = PRECEDENCE[sign]
        sides = (self.operand(left, sign, level), self.operand(right, sign, level + 1))
        return Expression("", sides, precedence=level, sign=sign)

    def operand(self, value: Any, sign: str, level: int) -> Expression:
        """Bracketed where Python needs it, and where `@` meets `*` or `/`, which reads wrong."""
        expression = self.value(value)
        mixed = expression.is_infix and (sign == "@") != (expression.sign == "@")
        mixed = mixed and PRECEDENCE.get(expression.sign) == level == PRECEDENCE["@"]
        if mixed or expression.precedence < level:
            return expression.in_brackets()
        return expression

    def owner(self, value: Any) -> Expression:
        """What stands before a subscript or a dot."""
        expression = self.value(value)
        return expression.in_brackets() if expression.precedence < ATOM else expression

    def call(self, head: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Expression:
        parts = [self.value(arg) for arg in args]
        parts += [self.value(value).labelled(f"{name}=") for name, value in kwargs.items()]
        return Expression(f"{head}(", tuple(parts), ")")

    def function_name(self, function: Callable[..., Any]) -> str:
        name = function.__name__
        for space, module in NAMESPACES.items():
            for public in (name, name.removeprefix("linalg_")):
                if getattr(module, public, None) is function:
                    return f"{space}.{public}"
        if getattr(builtins, name, None) is function:
            return name
        self.imports[name] = function.__module__
        return name


def _occurrences(node: fx.Node) -> int:
    """How often a node stands in the arguments of others."""
    found: list[fx.Node] = []
    for user in node.users:
        fx.node.map_arg((user.args, user.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found.count(node)


def _is_returned_at_once(node: fx.Node) -> bool:
    """Whether a named value is all that the function returns, so that it needs no name."""
    return node.next.op == "output" and node.next.args[0] is node and "unpack" not in node.meta


def _is_lookup(node: fx.Node) -> bool:
    """An entry of an argument or of a named value, ``state["64x576"]["q_gamma"]``: as short as a
    name of its own would be."""
    if node.target is not operator.getitem or isinstance(node.args[1], fx.Node | tuple):
        return False
    owner = node.args[0]
    if not isinstance(owner, fx.Node):
        return False
    return owner.op == "placeholder" or "statement" in owner.meta or _is_lookup(owner)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"' if '"' not in value and "\\" not in value else repr(value)
    return repr(value)


def _bound(value: Any) -> str:
    return "" if value is None else str(value)
