"""Run passes over a graph, keep every stage, and say which pass broke it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from kfc_fx.capture.graph import Stage, copy_graph
from kfc_fx.errors import KfcError

GraphPass = Callable[[fx.GraphModule], bool]
"""Changes a graph module in place and says whether it did."""


def run_passes(module: fx.GraphModule, passes: Sequence[tuple[str, GraphPass]]) -> list[Stage]:
    """Apply passes one after the other to copies of ``module``.

    Args:
        passes: (stage name, pass) pairs.

    Returns:
        One stage per pass; the input module is left as it was.

    Raises:
        KfcError: a pass raised or left an invalid graph; the message names it and those
            that ran before it.
    """
    stages: list[Stage] = []
    for name, graph_pass in passes:
        module = copy_graph(module)
        try:
            if graph_pass(module):
                module.graph.lint()
                module.recompile()
        except KfcError:
            raise
        except Exception as error:
            before = ", ".join(stage.name for stage in stages) or "none"
            raise KfcError(
                f"pass {name!r} failed: {error} (passes that ran before it: {before}). "
                f"The graph it was given:\n{module.graph}"
            ) from error
        stages.append(Stage(name, module))
    return stages
