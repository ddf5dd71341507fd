"""The examples in a model's inputs: positional and keyword arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def batch_size(inputs: Inputs) -> int:
    """Leading size of the first tensor that has one; 0 where there is none."""
    sizes = [leaf.size(0) for leaf in pytree.tree_leaves(inputs) if _has_examples(leaf)]
    return sizes[0] if sizes else 0


def first_examples(inputs: Inputs, samples: int | None) -> Inputs:
    """The inputs cut to the first so many examples; all of them for None."""
    if samples is None:
        return inputs
    batch = batch_size(inputs)
    return pytree.tree_map(
        lambda leaf: leaf[:samples] if _has_examples(leaf) and leaf.size(0) == batch else leaf,
        inputs,
    )


def inputs_of(batch: Any) -> Inputs:
    """How a batch of a data loader calls the model: a mapping by keyword, of a tuple or list the
    first entry, anything else as it is."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch[0] if isinstance(batch, tuple | list) else batch,), {}


def _has_examples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
