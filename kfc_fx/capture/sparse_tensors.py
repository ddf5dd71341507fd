"""Sparse tensors in captured graphs, where dynamo would leave their frames to plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.variables import builder, tensor

CHECK = "is_sparse_any"
"""Dynamo's function by which it breaks the graph at a sparse tensor."""


@contextmanager
def sparse_tensors_captured() -> Iterator[None]:
    """While it lasts, dynamo takes tensors in coordinate format into its graphs.

    It refuses them for its guards, which do not cover the number of entries. A graph that runs op
    by op depends on none of it: sizes, layout and type are guarded as those of dense ones are.
    """
    with ExitStack() as stack:
        for module in (builder, tensor):
            own = getattr(module, CHECK, None)
            if own is not None:
                stack.enter_context(patch.object(module, CHECK, _but_in_coordinates(own)))
        yield


def _but_in_coordinates(own: Any) -> Any:
    """The check, without tensors in coordinate format."""

    def is_sparse(value: Any) -> bool:
        if isinstance(value, torch.Tensor) and value.layout is torch.sparse_coo:
            return False
        return bool(own(value))

    return is_sparse
