"""A stage of a graph as Python that runs, each line with its shape, module and source line."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from kfc_fx.capture.nodes import module_of
from kfc_fx.inspect.nodes import dtype_of, shown_shape, source_of

CREATED = "created by "
INFIX: dict[Callable[..., Any], str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.matmul: "@",
}


def print_graph(
    module: fx.GraphModule,
    stage: str,
    created: Collection[str] = (),
    erased: Sequence[str] = (),
) -> str:
    """Source of a function ``forward(self, *inputs)``, and the imports it needs.

    Args:
        module: ``self`` of the function.
        stage: the pass that left the graph like this.
        created: names of nodes that the pass made; their lines say so.
        erased: names of nodes that it removed, listed in a comment.
    """
    printer = _Printer(stage, frozenset(created))
    body = [printer.line(node) for node in module.graph.nodes if node.op != "placeholder"]
    head = printer.head([node for node in module.graph.nodes if node.op == "placeholder"])
    imports = [f"import {name}" for name in sorted(printer.imports)]
    gone = [f"# erased by {stage}: {name}" for name in erased]
    return "\n".join([*imports, *gone, "", "", *head, *body]) + "\n"


class _Printer:
    def __init__(self, stage: str, created: frozenset[str]) -> None:
        self.stage = stage
        self.created = created
        self.imports = {"torch"}

    def head(self, placeholders: Sequence[fx.Node]) -> list[str]:
        if not placeholders:
            return ["def forward(self):"]
        lines = []
        for node in placeholders:
            default = f"={self.value(node.args[0])}" if node.args else ""
            lines.append(f"    {node.name}{default},{self.comment(node)}")
        return ["def forward(", "    self,", *lines, "):"]

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"    return {self.value(node.args[0])}"
        return f"    {node.name} = {self.expression(node)}{self.comment(node)}"

    def comment(self, node: fx.Node) -> str:
        shape = shown_shape(node)
        parts = [] if shape is None else [f"{dtype_of(node) or ''}{list(shape)}"]
        parts += [part for part in (module_of(node)[0], source_of(node)) if part]
        parts += [f"{CREATED}{self.stage}"] if node.name in self.created else []
        return f"  # {'  '.join(parts)}" if parts else ""

    def expression(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return _attribute("self", str(node.target))
        arguments = self.arguments(node.args, node.kwargs)
        if node.op == "call_module":
            return f"{_attribute('self', str(node.target))}({arguments})"
        if node.op == "call_method":
            rest = self.arguments(node.args[1:], node.kwargs)
            return f"{self.operand(node.args[0])}.{node.target}({rest})"
        target: Any = node.target
        if target in INFIX and len(node.args) == 2:
            left, right = (self.operand(a, signed=True) for a in node.args)
            return f"{left} {INFIX[target]} {right}"
        if target is operator.getitem:
            return f"{self.operand(node.args[0])}[{self.index(node.args[1])}]"
        return f"{self.name(target)}({arguments})"

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        named = [f"{name}={self.value(value)}" for name, value in kwargs.items()]
        return ", ".join([*map(self.value, args), *named])

    def operand(self, value: Any, *, signed: bool = False) -> str:
        """A value before a dot or a bracket, or beside an operator: numbers may need brackets."""
        text = self.value(value)
        bare = signed and not text.startswith("-")
        return f"({text})" if isinstance(value, int | float) and not bare else text

    def index(self, value: Any) -> str:
        if isinstance(value, tuple) and value:
            return ", ".join(map(self.index, value)) + ("," if len(value) == 1 else "")
        if isinstance(value, slice):
            ends = [value.start, value.stop] + ([] if value.step is None else [value.step])
            return ":".join("" if end is None else self.value(end) for end in ends)
        return self.value(value)

    def value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, tuple):
            inner = ", ".join(map(self.value, value))
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self.arguments([value.start, value.stop, value.step], {})})"
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        if isinstance(value, torch.device):
            return f"torch.{value!r}"
        is_named = callable(value) and getattr(value, "__name__", None)
        return self.name(value) if is_named else repr(value)

    def name(self, function: Any) -> str:
        """A function as an importable name; what it needs goes into :attr:`imports`."""
        if isinstance(function, torch._ops.OpOverload):
            return f"torch.ops.{function}"
        short: str = function.__name__
        name: str = getattr(function, "__qualname__", short)
        for prefix, namespace in (("torch", torch), ("torch.nn.functional", F)):
            if getattr(namespace, short, None) is function:
                self.imports.add(prefix)
                return f"{prefix}.{short}"
        module = getattr(function, "__module__", None) or "builtins"
        if module in ("builtins", "_operator"):
            self.imports.add("operator")
            return f"operator.{name}" if module == "_operator" else name
        self.imports.add(module)
        return f"{module}.{name}"


def _attribute(owner: str, path: str) -> str:
    for part in path.split("."):
        owner = f"{owner}.{part}" if part.isidentifier() else f"getattr({owner}, {part!r})"
    return owner
