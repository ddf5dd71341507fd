"""From update graphs to one source text, and from that text to the functions that run."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from kfc_fx.codegen.text.printer import print_function
from kfc_fx.codegen.text.update_graph import UpdateGraph

_serial = itertools.count()


@dataclass(frozen=True)
class UpdateProgram:
    """A generated update: its source, the functions compiled from it, and their graphs."""

    source: str
    functions: dict[str, Callable[..., Any]]
    graphs: Mapping[str, fx.GraphModule]


def build_program(header: str, updates: Sequence[UpdateGraph]) -> UpdateProgram:
    """Print the graphs as one module and compile the printed text.

    The text is entered into ``linecache``, so that a traceback through the update shows it.
    """
    printed = [print_function(update) for update in updates]
    imports: dict[str, set[str]] = {}
    for _, names in printed:
        for name, module in names.items():
            imports.setdefault(module, set()).add(name)
    lines = ["import torch", ""] if imports else ["import torch"]
    lines += [
        f"from {module} import {', '.join(sorted(names))}"
        for module, names in sorted(imports.items())
    ]
    body = "\n\n".join(text for text, _ in printed)
    source = f'"""{header}"""\n\n' + "\n".join(lines) + "\n\n\n" + body
    graphs = {u.name: fx.GraphModule(nn.Module(), u.graph, u.name) for u in updates}
    return UpdateProgram(source, _load(source, [u.name for u in updates]), graphs)


def _load(source: str, names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    filename = f"<kfc_fx update {next(_serial)}>"
    namespace: dict[str, Any] = {"__name__": "kfc_fx.generated_update"}
    exec(compile(source, filename, "exec"), namespace)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return {name: namespace[name] for name in names}
