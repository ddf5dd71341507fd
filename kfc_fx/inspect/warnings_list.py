"""What a person should know before training from a compilation."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from kfc_fx.inspect.inspection import Inspection

NOTABLE_SHARE = 0.05
"""Generic parameters beyond this share of all numbers are worth a warning."""


def warnings_of(inspection: Inspection) -> list[str]:
    """Warnings, each a sentence."""
    return [
        *inspection.notes,
        *_capture_warnings(inspection),
        *_plan_warnings(inspection),
        *_pass_warnings(inspection),
    ]


def _capture_warnings(inspection: Inspection) -> Iterator[str]:
    if inspection.options.capture == "symbolic":
        yield (
            "captured by symbolic_trace: Python branches and the training flag are fixed in the "
            "graph; it is for looking, not for training"
        )
    if inspection.plan.graphs_text:
        yield (
            f"captured in {inspection.plan.graphs_text}: Python between them runs as it is, and "
            "every graph emits its own blocks"
        )
    yield from map(str, inspection.plan.breaks)
    if not inspection.compiled.training:
        yield "the model is in evaluation mode: norms and dropout are captured that way"


def _plan_warnings(inspection: Inspection) -> Iterator[str]:
    plan = inspection.plan
    total = sum(p.numel() for p in inspection.parameters.values())
    if not plan.blocks:
        yield "no parameter has a block: there is nothing to precondition"
    generic = sum(prod(g.shape) for g in plan.generic)
    if plan.blocks and total and generic > NOTABLE_SHARE * total:
        largest = max(plan.generic, key=lambda g: prod(g.shape))
        yield (
            f"{100 * generic / total:.0f}% of all numbers have no block; the largest is "
            f"{largest.name} {list(largest.shape)}: {largest.reason}"
        )
    for name in (g.name for g in plan.generic if "not used" in g.reason):
        yield f"{name} is not used in any captured graph"


def _pass_warnings(inspection: Inspection) -> Iterator[str]:
    skipped = [stage.name for stage in inspection.graphs[0].stages if stage.skipped]
    if skipped:
        yield f"passes left out: {', '.join(skipped)}"
