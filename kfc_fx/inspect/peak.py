"""Count the most memory that whatever runs holds at a time, on tensors without data."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from kfc_fx.inspect.counting import WorkCounter


class PeakCounter(WorkCounter):
    """While it lasts, :attr:`peak` is the most bytes of storages that calls have made and that were
    alive together. Storages of arguments that came from outside count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.held: int = 0
        self.peak: int = 0
        self._tensors: Counter[int] = Counter()
        """By storage: how many tensors that are alive lie in it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count the work of one call, and note what it returns."""
        given = {_storage(t) for t in _tensors((args, kwargs or {}))}
        outside = given - self._tensors.keys()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in _tensors(result):
            if _storage(tensor) not in outside:
                self._note(tensor)
        self.peak = max(self.peak, self.held)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if not self._tensors[storage]:
            self.held += size
        self._tensors[storage] += 1
        weakref.finalize(tensor, self._gone, storage, size)

    def _gone(self, storage: int, size: int) -> None:
        self._tensors[storage] -= 1
        if not self._tensors[storage]:
            del self._tensors[storage]
            self.held -= size


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
