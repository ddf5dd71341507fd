"""A ``torch.fx`` graph of one update function, built by ordinary expressions on proxies."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer, Proxy

Value = Any
"""A ``torch.fx`` proxy, whose operators torch leaves untyped."""


class UpdateGraph:
    """Builds the graph and marks what the printed source should show.

    Values named by :meth:`let` become statements with their names and shape comments; all
    others stand inside the expression that uses them.
    """

    def __init__(self, name: str, summary: str) -> None:
        self.name = name
        self.summary = summary
        self.graph = fx.Graph()
        self._tracer = GraphAppendingTracer(self.graph)
        self._section: str | None = None

    def argument(self, name: str) -> Value:
        """An argument of the function."""
        return Proxy(self.graph.placeholder(name), self._tracer)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Value:
        """A call, with proxies anywhere in its arguments."""
        return self._tracer.create_proxy("call_function", function, args, kwargs)

    def section(self, title: str) -> None:
        """A comment line before the next statement."""
        self._section = title

    def let(self, name: str, value: Value, shape: Sequence[int] | None = None) -> Value:
        """Name a value; its statement carries the shape as a comment."""
        self._statement(value.node, shape)
        value.node._rename(name)
        return value

    def let_list(self, name: str, values: Value) -> Value:
        """Name a list of large values."""
        self._statement(values.node, None)
        values.node._rename(name)
        values.node.meta["large"] = True
        return values

    def let_tuple(self, names: Sequence[str], value: Value) -> tuple[Value, ...]:
        """Unpack a call that returns a tuple into named values."""
        self._statement(value.node, None)
        parts = tuple(self.call(operator.getitem, value, index) for index in range(len(names)))
        for name, part in zip(names, parts, strict=True):
            part.node._rename(name)
            part.node.meta["unpacked"] = True
        value.node.meta["unpack"] = [part.node for part in parts]
        return parts

    def effect(self, function: Callable[..., Any], *args: Any) -> None:
        """A call for its effect on its arguments."""
        node = self.call(function, *args).node
        self._statement(node, None)
        node.meta["effect"] = True

    def named_list(self, name: str, values: Sequence[Value]) -> Value:
        """A list that is used more than once."""
        return self.let_list(name, self.call(list, tuple(values)))

    def finish(self, result: Any) -> UpdateGraph:
        """Return ``result``, a nest of dicts and lists of values."""
        self.graph.output(fx.node.map_aggregate(result, _node_of))
        for node in reversed(self.graph.nodes):
            needed = node.op in ("placeholder", "output") or {"effect", "unpacked"} & set(node.meta)
            if not needed and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        return self

    def _statement(self, node: fx.Node, shape: Sequence[int] | None) -> None:
        node.meta["statement"] = True
        if shape is not None:
            node.meta["shape"] = tuple(shape)
        if self._section is not None:
            node.meta["section"], self._section = self._section, None


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, Proxy) else value
