"""Why a model gave no statistics or no graph, in sentences that say what to do."""

from __future__ import annotations

from collections.abc import Iterable

from kfc_fx.capture.graph_breaks import GraphBreak

FOREIGN = (
    "the model was called with other tensors in place of its parameters, as by "
    "torch.func.functional_call, and statistics are of its own"
)
"""Why a forward pass gives no statistics."""


def why_not_called(*, installed: bool) -> str:
    """What to do where no call of a model has come to its compilation.

    Args:
        installed: whether its calls do come there.
    """
    if not installed:
        return (
            "model.compile() was called after kfc_fx.compile and takes the model's calls: "
            "leave it out, and pass backend='inductor' to kfc_fx.compile"
        )
    return (
        "call the model with gradients enabled, after KFC was made, and compute the loss from "
        "what it returns; torch.compile around the model or around the training step traces "
        "past kfc_fx, and kfc_fx.compile(model, backend='inductor') takes its place"
    )


def why_nothing_ran(breaks: Iterable[GraphBreak]) -> str:
    """The reasons for which a forward pass ran outside of all graphs."""
    found = "; ".join(str(b) for b in breaks if b.skipped)
    return "the forward pass ran outside the captured graphs, so no statistics can be taken: " + (
        found or "dynamo captured nothing (is it disabled, by TORCHDYNAMO_DISABLE=1?)"
    )
