"""Run passes over a graph, keep every stage, and say which pass broke it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import fx

from kfc_fx.artifacts import record_artifact
from kfc_fx.capture.graph import Stage, copy_graph
from kfc_fx.errors import KfcError

GraphPass = Callable[[fx.GraphModule], bool]
"""Changes a graph module in place and says whether it did."""


_left_out: ContextVar[frozenset[str]] = ContextVar("passes left out", default=frozenset())


@contextmanager
def without_passes(names: Iterable[str]) -> Iterator[None]:
    """While it lasts, the named passes are skipped, to find the one that breaks a graph."""
    token = _left_out.set(frozenset(names))
    try:
        yield
    finally:
        _left_out.reset(token)


def run_passes(module: fx.GraphModule, passes: Sequence[tuple[str, GraphPass]]) -> list[Stage]:
    """Apply passes one after the other to copies of ``module``.

    Args:
        passes: (stage name, pass) pairs.

    Returns:
        One stage per pass; the input module is left as it was. A pass that
        :func:`without_passes` names leaves the graph unchanged.

    Raises:
        KfcError: a pass raised or left an invalid graph; the message names it and those
            that ran before it.
    """
    stages: list[Stage] = []
    for name, graph_pass in passes:
        module = copy_graph(module)
        before = [stage.name for stage in stages if not stage.skipped]
        skipped = name in _left_out.get()
        started = time.perf_counter()
        if not skipped:
            _run(name, graph_pass, module, before)
        stage = Stage(name, module, time.perf_counter() - started, skipped)
        record_artifact(name, lambda made=stage: made.code)  # type: ignore[misc]
        stages.append(stage)
    return stages


def _run(name: str, graph_pass: GraphPass, module: fx.GraphModule, before: Sequence[str]) -> None:
    try:
        if graph_pass(module):
            module.graph.lint()
            module.recompile()
    except KfcError:
        raise
    except Exception as error:
        failure = KfcError(
            f"pass {name!r} failed: {type(error).__name__}: {error} (passes that ran before it: "
            f"{', '.join(before) or 'none'})"
        )
        failure.add_note(f"The graph it was given:\n{module.graph}")
        raise failure from error
