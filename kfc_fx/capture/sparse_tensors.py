"""Sparse tensors in captured graphs, where dynamo would leave their frames to plain Python."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.variables import builder, tensor

from kfc_fx.capture.permission import Permission

CHECK = "is_sparse_any"
"""Dynamo's function by which it breaks the graph at a sparse tensor."""


sparse_tensors_captured = Permission()
"""Whether dynamo takes tensors in coordinate format into its graphs.

It refuses them for its guards, which do not cover the number of entries. A graph that runs op by op
depends on none of it: sizes, layout and type are guarded as those of dense ones are.
"""


def _but_in_coordinates(own: Any) -> Any:
    """The check, without tensors in coordinate format."""

    def is_sparse(value: Any) -> bool:
        if sparse_tensors_captured and isinstance(value, torch.Tensor):
            return value.layout is not torch.sparse_coo and bool(own(value))
        return bool(own(value))

    return is_sparse


for _module in (builder, tensor):
    if hasattr(_module, CHECK):
        setattr(_module, CHECK, _but_in_coordinates(getattr(_module, CHECK)))
