"""Checkpointed regions without a compiler: recomputed with the random numbers of the first run.

``tag_activation_checkpoint`` leaves random numbers to Inductor, which fixes a seed for each
operation. Run op by op, a dropout inside would drop other elements in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils.checkpoint import checkpoint, noop_context_fn

from kfc_fx.capture.graph import copy_graph
from kfc_fx.capture.regions import REGION


def run_region(
    body: fx.GraphModule, *operands: Any, preserve_rng_state: bool = True, **options: Any
) -> Any:
    """Call a region's body, keep none of its activations, and run it again when they are needed."""
    options["use_reentrant"] = False
    context = body.meta.get("_checkpoint_context_fn", noop_context_fn)
    return checkpoint(
        body, *operands, preserve_rng_state=preserve_rng_state, context_fn=context, **options
    )


def run_by_op(module: fx.GraphModule) -> Callable[..., Any]:
    """The function that runs a graph op by op, with what its regions would do uncompiled."""
    if not any(_is_region(node) for node in module.graph.nodes):
        return module.forward
    copied = copy_graph(module)
    _replace(copied)
    return copied.forward


def _replace(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if _is_region(node):
            node.target = run_region
            body = getattr(module, str(node.args[0].target))
            _replace(body)
    module.recompile()


def _is_region(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == REGION
