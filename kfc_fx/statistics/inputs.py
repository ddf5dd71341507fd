"""The examples in a model's inputs: positional and keyword arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def batch_size(inputs: Inputs, batch_dim: int = 0) -> int:
    """Size along ``batch_dim`` of the first tensor that has it; 0 where there is none."""
    leaves = pytree.tree_leaves(inputs)
    sizes = [leaf.size(batch_dim) for leaf in leaves if _has_examples(leaf, batch_dim)]
    return sizes[0] if sizes else 0


def first_examples(inputs: Inputs, samples: int | None, batch_dim: int = 0) -> Inputs:
    """The inputs cut to the first so many examples; all of them for None."""
    if samples is None:
        return inputs
    batch = batch_size(inputs, batch_dim)

    def cut(leaf: Any) -> Any:
        if _has_examples(leaf, batch_dim) and leaf.size(batch_dim) == batch:
            return leaf.narrow(batch_dim, 0, min(samples, batch))
        return leaf

    return pytree.tree_map(cut, inputs)


def inputs_of(batch: Any) -> Inputs:
    """How a batch of a data loader calls the model: a mapping by keyword, of a tuple or list the
    first entry, anything else as it is."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch[0] if isinstance(batch, tuple | list) else batch,), {}


def _has_examples(leaf: Any, batch_dim: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > batch_dim
