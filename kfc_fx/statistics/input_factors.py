"""Statistics of a layer's input alone, taken in the forward pass.

Where a block needs no Γ, no cotangent is needed either: the graph computes Ω beside the layer and
returns it, and no Fisher pass is run for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfc_fx.statistics.emission import is_traced, profiler_range, unnested
from kfc_fx.statistics.rules.matrices import MatrixRule
from kfc_fx.statistics.rules.table import rule
from kfc_fx.statistics.running import forward_share


def input_statistics(
    inputs: tuple[Tensor, ...], *, kind: str, block: str = "", **options: Any
) -> tuple[Tensor, ...]:
    """Ω of a layer, or its two partial traces; see :func:`~kfc_fx.statistics.emission.emit`.

    Args:
        inputs: the layer's input, and what its rule reads besides.
        kind: of the layer, one whose weight is a matrix.
        block: name of the layer's block.
        options: the fields of the kind's rule.

    Returns:
        The statistics; none where the armed forward pass that runs wants none of this block, but
        in traced code.
    """
    share = forward_share(block, traced=is_traced(inputs[0]))
    if share is None:
        return ()
    own = rule(kind, options)
    assert isinstance(own, MatrixRule), f"{kind} has no statistics of its input alone"
    x, *others = (unnested(tensor.detach()) for tensor in inputs)
    with profiler_range(block, x):
        return own.input_statistics(share, x, *others)


torch.compiler.allow_in_graph(input_statistics)
