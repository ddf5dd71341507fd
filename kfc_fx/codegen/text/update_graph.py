"""A ``torch.fx`` graph of one update function, built by ordinary expressions on proxies."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer, Proxy

Value = Any
"""A ``torch.fx`` proxy, whose operators torch leaves untyped."""


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Printed as ``{**first, **second}``: the entries of all, later ones in place of earlier."""
    return {key: value for mapping in mappings for key, value in mapping.items()}


def values_at(mapping: Mapping[str, Any], names: Iterable[str]) -> list[Any]:
    """Printed as ``[mapping[name] for name in names]``."""
    return [mapping[name] for name in names]


def entries_at(
    mapping: Mapping[str, Mapping[str, Any]], keys: Iterable[str], name: str
) -> list[Any]:
    """Printed as ``[mapping[key]["name"] for key in keys]``."""
    return [mapping[key][name] for key in keys]


def complements(shares: Sequence[Any]) -> list[Any]:
    """Printed as ``[1 - each for each in shares]``."""
    return [1 - each for each in shares]


def complements_of_powers(shares: Sequence[Any], count: Any) -> list[Any]:
    """Printed as ``[1 - each**count for each in shares]``."""
    return [1 - each**count for each in shares]


class UpdateGraph:
    """Builds the graph and marks what the printed source should show.

    Values named by :meth:`let` become statements with their names and shape comments; all
    others stand inside the expression that uses them. A function may have functions of its own
    (:meth:`function`), each a graph that the outer one calls as a submodule.

    The printer reads these entries of a node's ``meta``:

    - ``statement``: the node is a statement of its own, with the node's name.
    - ``comment``: what stands behind the statement.
    - ``section``: a comment line before the statement.
    - ``unpack``: the nodes whose names the statement unpacks its tuple into, each ``unpacked``.
    - ``effect``: the call has no result that is used, and stays.
    """

    def __init__(self, name: str, summary: str = "") -> None:
        self.name = name
        self.summary = summary
        self.graph: fx.Graph = fx.Graph()
        self.sections: dict[str, list[UpdateGraph]] = {}
        """The functions within this one, by the comment that they stand under."""
        self._tracer = GraphAppendingTracer(self.graph)
        self._section: str | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the function's arguments, in their order."""
        return tuple(str(node.target) for node in self._placeholders())

    @property
    def functions(self) -> Iterator[UpdateGraph]:
        """The functions within this one."""
        return (inner for inners in self.sections.values() for inner in inners)

    def argument(self, name: str) -> Value:
        """An argument of the function."""
        return Proxy(self.graph.placeholder(name), self._tracer)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Value:
        """A call, with proxies anywhere in its arguments."""
        return self._tracer.create_proxy("call_function", function, args, kwargs)

    def function(
        self,
        name: str,
        section: str,
        arguments: Mapping[str, Value],
        body: Callable[[UpdateGraph, dict[str, Value]], Any],
    ) -> Value:
        """Define a function within this one and call it; one that is there already is called again.

        Args:
            section: comment that the function stands under, with others of the same.
            arguments: name in the function to the value of this one that it is called with; those
                that the function does not use are left out.
            body: called with the graph of the function and its arguments; returns what it returns.
        """
        inner = next((known for known in self.functions if known.name == name), None)
        if inner is None:
            inner = UpdateGraph(name)
            inner.finish(body(inner, {n: inner.argument(n) for n in arguments}))
            for node in inner._placeholders():
                if not node.users:
                    inner.graph.erase_node(node)
            self.sections.setdefault(section, []).append(inner)
        values = tuple(arguments[argument] for argument in inner.arguments)
        return self._tracer.create_proxy("call_module", name, values, {})

    def section(self, title: str) -> None:
        """A comment line before the next statement."""
        self._section = title

    def let(
        self, name: str, value: Value, shape: Sequence[int] | None = None, *, remark: str = ""
    ) -> Value:
        """Name a value; its statement carries the shape, or a remark, as a comment."""
        self._statement(value.node, remark or (str(list(shape)) if shape is not None else ""))
        value.node._rename(name)
        return value

    def let_tuple(self, names: Sequence[str], value: Value) -> tuple[Value, ...]:
        """Unpack a call that returns a tuple into named values."""
        self._statement(value.node)
        parts = tuple(self.call(operator.getitem, value, index) for index in range(len(names)))
        for name, part in zip(names, parts, strict=True):
            part.node._rename(name)
            part.node.meta["unpacked"] = True
        value.node.meta["unpack"] = [part.node for part in parts]
        return parts

    def effect(self, function: Callable[..., Any], *args: Any) -> None:
        """A call for its effect on its arguments."""
        node = self.call(function, *args).node
        self._statement(node)
        node.meta["effect"] = True

    def named_list(self, name: str, values: Sequence[Value]) -> Value:
        """A list that is used more than once."""
        return self.let(name, self.call(list, tuple(values)))

    def finish(self, result: Any) -> UpdateGraph:
        """Return ``result``, a nest of dicts and lists of values."""
        self.graph.output(fx.node.map_aggregate(result, _node_of))
        for node in reversed(self.graph.nodes):
            needed = node.op in ("placeholder", "output") or {"effect", "unpacked"} & set(node.meta)
            if not needed and not node.users:
                self.graph.erase_node(node)
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        for section, inners in self.sections.items():
            self.sections[section] = [inner for inner in inners if inner.name in called]
        self.graph.lint()
        return self

    def module(self) -> fx.GraphModule:
        """The graph as a module, that of each inner function a submodule of it."""
        inners: dict[str, nn.Module] = {inner.name: inner.module() for inner in self.functions}
        root = nn.Module()
        for name, inner in inners.items():
            root.add_module(name, inner)
        return fx.GraphModule(root, self.graph, self.name)

    def _placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def _statement(self, node: fx.Node, comment: str = "") -> None:
        node.meta["statement"] = True
        if comment:
            node.meta["comment"] = comment
        if self._section is not None:
            node.meta["section"], self._section = self._section, None


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, Proxy) else value
