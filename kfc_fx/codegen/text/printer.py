"""Print update graphs as the Python that a person would write for that network."""

from __future__ import annotations

import builtins
import math
import operator
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from kfc_fx.codegen.text.update_graph import UpdateGraph

WIDTH = 100
INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.matmul: "@",
    operator.pow: "**",
}
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "@": 2, "**": 4}
ATOM, UNARY = 9, 3


@dataclass(frozen=True)
class Expression:
    """Source of a value: text, brackets around parts, or an operator between two parts."""

    head: str
    parts: tuple[Expression, ...] = ()
    tail: str = ""
    precedence: int = ATOM
    sign: str = ""

    @property
    def flat(self) -> str:
        """On one line."""
        between = f" {self.sign} " if self.sign else ", "
        return self.head + between.join(part.flat for part in self.parts) + self.tail

    def labelled(self, label: str) -> Expression:
        """The expression behind a label, such as ``name = `` or ``"key": ``."""
        return replace(self, head=label + self.head)

    def in_brackets(self) -> Expression:
        """The expression in round brackets."""
        if self.sign:
            return replace(self, head="(" + self.head, tail=self.tail + ")", precedence=ATOM)
        return Expression("(", (self,), ")")


def print_function(update: UpdateGraph) -> tuple[str, dict[str, str]]:
    """Source of an update graph.

    Returns:
        The text of the function, and the names it imports by the module they come from.
    """
    printer = _Printer()
    lines = printer.body(update.graph)
    arguments = [node.target for node in update.graph.nodes if node.op == "placeholder"]
    head = Expression(f"def {update.name}(", tuple(Expression(str(a)) for a in arguments), "):")
    text = [*_broken(head, 0, ""), f'    """{update.summary}"""', *lines]
    return "\n".join(text) + "\n", printer.imports


class _Printer:
    def __init__(self) -> None:
        self.imports: dict[str, str] = {}
        self.inlined: dict[fx.Node, Expression] = {}

    def body(self, graph: fx.Graph) -> list[str]:
        lines: list[str] = []
        deaths = _deaths(graph)
        for node in graph.nodes:
            if node.op == "placeholder" or "unpacked" in node.meta:
                continue
            if node.op == "output":
                lines += _broken(self.value(node.args[0]).labelled("return "), 4)
            elif "statement" in node.meta or (_occurrences(node) > 1 and not _is_lookup(node)):
                if "section" in node.meta:
                    lines += ["", f"    # {node.meta['section']}"]
                lines += self.statement(node)
                if node in deaths:
                    lines += _delete(deaths[node])
            else:
                self.inlined[node] = self.node(node)
        return lines

    def statement(self, node: fx.Node) -> list[str]:
        expression = self.node(node)
        target = (
            ", ".join(n.name for n in node.meta["unpack"]) if "unpack" in node.meta else node.name
        )
        prefix = "" if "effect" in node.meta else f"{target} = "
        comment = f"  # {list(node.meta['shape'])}" if "shape" in node.meta else ""
        if len(prefix) + len(expression.head) > WIDTH - 8 and "unpack" in node.meta:
            names = tuple(Expression(n.name) for n in node.meta["unpack"])
            *targets, last = _broken(Expression("(", names, ") ="), 4, force=True)
            first, *rest = _broken(expression, 4)
            return [*targets, f"{last} {first.strip()}", *rest]
        return _broken(expression.labelled(prefix), 4, comment)

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
            return self.call(f"{self.bracketed(owner, ATOM)}.{node.target}", args, node.kwargs)
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        if target in INFIX:
            return self.infix(INFIX[target], *node.args)
        if target is operator.neg:
            return Expression(f"-{self.bracketed(node.args[0], UNARY)}", precedence=UNARY)
        if target is operator.getitem:
            return Expression(f"{self.bracketed(node.args[0], ATOM)}[{self.index(node.args[1])}]")
        if target is getattr:
            return Expression(f"{self.bracketed(node.args[0], ATOM)}.{node.args[1]}")
        if target is list:
            return self.value(list(node.args[0]))  # type: ignore[arg-type]
        return self.call(self.function_name(target), node.args, node.kwargs)

    def infix(self, sign: str, left: Any, right: Any) -> Expression:
        level = PRECEDENCE[sign]
        sides = (self.operand(left, sign, level), self.operand(right, sign, level + 1))
        return Expression("", sides, precedence=level, sign=sign)

    def operand(self, value: Any, sign: str, level: int) -> Expression:
        """Bracketed where Python needs it, and where `@` meets `*` or `/`, which reads wrong."""
        expression = self.value(value)
        mixed = bool(expression.sign) and (sign == "@") != (expression.sign == "@")
        mixed = mixed and PRECEDENCE.get(expression.sign) == level == PRECEDENCE["@"]
        if mixed or expression.precedence < level:
            return expression.in_brackets()
        return expression

    def bracketed(self, value: Any, level: int) -> str:
        expression = self.value(value)
        return f"({expression.flat})" if expression.precedence < level else expression.flat

    def index(self, index: Any) -> str:
        if isinstance(index, tuple):
            return ", ".join(self.value(part).flat for part in index)
        return self.value(index).flat

    def call(self, head: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Expression:
        parts = [self.value(arg) for arg in args]
        parts += [self.value(value).labelled(f"{name}=") for name, value in kwargs.items()]
        return Expression(f"{head}(", tuple(parts), ")")

    def function_name(self, function: Callable[..., Any]) -> str:
        name = function.__name__
        if getattr(torch, name, None) is function:
            return f"torch.{name}"
        if getattr(builtins, name, None) is function:
            return name
        self.imports[name] = function.__module__
        return name


def _deaths(graph: fx.Graph) -> dict[fx.Node, list[str]]:
    """Last statement of each section to the names of large values that nothing needs after it.

    A function of many sections would else hold the intermediate values of all of them at once.
    """
    section, section_of, last = 0, {}, {}
    for node in graph.nodes:
        section += "section" in node.meta
        section_of[node] = section
        if "statement" in node.meta:
            last[section] = node
    needed: dict[fx.Node, float] = {}
    for node in reversed(graph.nodes):
        needed[node] = max((_needed_in(user, section_of, needed) for user in node.users), default=0)
    deaths: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        end = last.get(needed[node])  # type: ignore[call-overload]
        if end is not None and end is not node and _is_large(node):
            deaths.setdefault(end, []).append(node.name)
    return deaths


def _is_large(node: fx.Node) -> bool:
    named = "statement" in node.meta and "effect" not in node.meta
    return named and ("large" in node.meta or prod(node.meta.get("shape", ())[1:]) > 1)


def _needed_in(
    user: fx.Node, section_of: dict[fx.Node, int], needed: dict[fx.Node, float]
) -> float:
    """The section up to which a use needs its value: that of the statement it stands in, and
    forever where it is returned."""
    if user.op == "output":
        return math.inf
    return section_of[user] if "statement" in user.meta else max(section_of[user], needed[user])


def _delete(names: Sequence[str]) -> list[str]:
    width = WIDTH - len("    del ")
    return [f"    del {line.rstrip(',')}" for line in textwrap.wrap(", ".join(names), width)]


def _occurrences(node: fx.Node) -> int:
    """How often a node stands in the arguments of others."""
    found: list[fx.Node] = []
    for user in node.users:
        fx.node.map_arg((user.args, user.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found.count(node)


def _is_lookup(node: fx.Node) -> bool:
    """``argument["key"]``: as short as a name of its own would be."""
    return (
        node.target is operator.getitem
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "placeholder"
    )


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"' if '"' not in value and "\\" not in value else repr(value)
    return repr(value)


def _bound(value: Any) -> str:
    return "" if value is None else str(value)


def _broken(
    expression: Expression, indent: int, comment: str = "", *, force: bool = False
) -> list[str]:
    """Lines of an expression, broken at its outermost brackets where it is too wide."""
    pad = " " * indent
    if not force and (len(pad + expression.flat) <= WIDTH or not expression.parts):
        line = pad + expression.flat
        if comment and len(line + comment) > WIDTH:
            return [pad + comment.strip(), line]
        return [line + comment]
    inner = expression.parts[0]
    if len(expression.parts) == 1 and inner.parts and not inner.sign:  # f([...]) breaks inside
        merged = Expression(expression.head + inner.head, inner.parts, inner.tail + expression.tail)
        return _broken(merged, indent, comment)
    if expression.sign:
        return _broken_infix(expression, indent, comment)
    lines = [pad + expression.head + comment]
    for part in expression.parts:
        broken = _broken(part, indent + 4)
        broken[-1] += ","
        lines += broken
    return [*lines, pad + expression.tail.removeprefix(",")]  # the comma of a tuple of one


def _broken_infix(expression: Expression, indent: int, comment: str) -> list[str]:
    """Operands on lines of their own, inside brackets, each operator before its operand."""
    pad = " " * indent
    left, right = expression.parts
    operands = [left]
    while left.sign == expression.sign and not left.head:  # a chain of one operator
        operands[:1] = left.parts
        left = operands[0]
    operands.append(right)
    head, tail = expression.head, expression.tail
    if not head.endswith("("):
        head, tail = head + "(", tail + ")"
    lines = [pad + head + comment, *_broken(operands[0], indent + 4)]
    for operand in operands[1:]:
        lines += _broken(operand.labelled(f"{expression.sign} "), indent + 4)
    return [*lines, pad + tail]
