"""From update graphs to one source text, and from that text to the functions that run."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.codegen.text.expressions import WIDTH, Expression, broken
from kfc_fx.codegen.text.printer import docstring, print_function
from kfc_fx.codegen.text.update_graph import UpdateGraph, entries_at

_serial = itertools.count()


@dataclass(frozen=True)
class UpdateProgram:
    """A generated update: its source, the functions compiled from it, and their graphs."""

    spec: UpdateSpec
    source: str
    functions: dict[str, Callable[..., Any]]
    updates: Mapping[str, UpdateGraph]
    """What each function was printed from."""
    arguments: Mapping[str, tuple[str, ...]]
    """Names of the arguments of each function, in their order."""

    def graph(self, function: str) -> fx.GraphModule:
        """The graph of a function; the functions within it are submodules of it."""
        return self.updates[function].module()

    @property
    def state_of_step(self) -> dict[str, list[str]]:
        """Names of the state entries that ``apply`` reads, by stack."""
        graph = self.graph("apply")
        state = next((n for n in _placeholders(graph) if n.target == "state"), None)
        found: dict[str, list[str]] = {}
        for user in state.users if state else ():
            for key, names in _looked_up(graph, user).items():
                found.setdefault(key, []).extend(names)
        return {key: list(dict.fromkeys(names)) for key, names in found.items()}


def build_program(spec: UpdateSpec, header: str, updates: Sequence[UpdateGraph]) -> UpdateProgram:
    """Print the graphs as one module and compile the printed text.

    The text is entered into ``linecache``, so that a traceback through the update shows it.
    """
    printed = [print_function(update) for update in updates]
    imports: dict[str, set[str]] = {}
    for _, names in printed:
        for name, module in names.items():
            imports.setdefault(module, set()).add(name)
    lines = ["import torch", ""] if imports else ["import torch"]
    for module, found in sorted(imports.items()):
        listed = tuple(Expression(name) for name in sorted(found))
        line = Expression(f"from {module} import ", listed)
        wide = len(line.flat) > WIDTH
        lines += broken(Expression(line.head + "(", listed, ")"), 0) if wide else [line.flat]
    body = "\n\n\n".join("\n".join(text) for text, _ in printed) + "\n"
    source = "\n".join([*docstring(header, 0), "", *lines, "", "", body])
    return UpdateProgram(
        spec,
        source,
        _load(source, [update.name for update in updates]),
        {update.name: update for update in updates},
        {update.name: update.arguments for update in updates},
    )


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _looked_up(module: fx.GraphModule, user: fx.Node) -> dict[str, list[str]]:
    """Entries of the state that one of its uses looks up, by stack."""
    if user.target is not entries_at:
        return {str(user.args[1]): _entries_of(module, user)}
    _, keys, name = user.args
    assert isinstance(keys, fx.Node)
    return {str(key): [str(name)] for key in keys.args[0]}  # type: ignore[union-attr]


def _entries_of(module: fx.GraphModule, mapping: fx.Node) -> list[str]:
    """Keys of the entries that are looked up in a mapping, in the functions that it goes to too."""
    found: list[str] = []
    for user in mapping.users:
        if user.op == "call_module":
            inner = module.get_submodule(str(user.target))
            assert isinstance(inner, fx.GraphModule)
            for value, argument in zip(user.args, _placeholders(inner), strict=True):
                if value is mapping:
                    found += _entries_of(inner, argument)
        else:
            found.append(str(user.args[1]))
    return found


def _load(source: str, names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    filename = f"<kfc_fx update {next(_serial)}>"
    namespace: dict[str, Any] = {"__name__": "kfc_fx.generated_update"}
    exec(compile(source, filename, "exec"), namespace)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return {name: namespace[name] for name in names}
