"""Count the work of whatever runs: floating-point operations and bytes moved.

Nothing is computed: tensors are fake or on the meta device. Operations are those of products,
convolutions and decompositions, two for each multiply-add; pointwise work counts as bytes alone.
Bytes are what each call reads and writes; views move none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kfc_fx.engine.work import EIGH

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class WorkCounter(TorchDispatchMode):
    """While it lasts, :attr:`work` grows by the work of every call.

    Args:
        implementations: what to run, and count, in place of an operator.
    """

    def __init__(self, implementations: dict[object, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.work: Work = Work()
        self.uncounted: set[str] = set()
        """Operators that may hold products and whose operations are not counted."""
        self._implementations = implementations or {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one call."""
        kwargs = kwargs or {}
        if func in self._implementations:
            with self:
                return self._implementations[func](*args, **kwargs)
        if func in WITHOUT_DATA:
            return WITHOUT_DATA[func](*args)
        result = func(*args, **kwargs)
        flops = _flops(func, args, kwargs, result)
        if func.namespace not in COUNTED_NAMESPACES or FUSED.search(func._opname):
            self.uncounted.add(str(func._overloadpacket))
        self.work += Work(flops, _bytes(func, args, kwargs, result))
        return result


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = func._overloadpacket
    if packet in DECOMPOSITIONS:
        matrix = next(arg for arg in args if isinstance(arg, Tensor))
        rows, columns = matrix.shape[-2:]
        return round(prod(matrix.shape[:-2]) * DECOMPOSITIONS[packet](rows, columns))
    if packet is aten.dot:
        return 2 * args[0].numel()
    formula = flop_registry.get(SAME_WORK.get(packet, packet))
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if (
        any(
            returned.alias_info and not returned.alias_info.is_write
            for returned in func._schema.returns
        )
        or func._overloadpacket in WITHOUT_TRAFFIC
    ):
        return 0
    tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
    return sum(_held_bytes(tensor) for tensor in tensors)


def _held_bytes(tensor: Tensor) -> int:
    """An expanded dimension is one element in memory."""
    held = [int(size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    return tensor.element_size() * prod(held) if tensor.numel() else 0


def _symmetric(side: int, _: int) -> float:
    return EIGH * side**3


def _qr(rows: int, columns: int) -> float:
    """Householder, with Q formed."""
    inner = min(rows, columns)
    return 4 * max(rows, columns) * inner**2 - 4 * inner**3 / 3


DECOMPOSITIONS: dict[object, Callable[[int, int], float]] = {
    aten._linalg_eigh: _symmetric,
    aten.linalg_qr: _qr,
    aten.linalg_cholesky_ex: lambda side, _: side**3 / 3,
    aten.cholesky_inverse: lambda side, _: 2 * side**3 / 3,
}
"""Operations by rows and columns, from Golub & Van Loan (sections 8.3, 5.2, 4.2)."""

COUNTED_NAMESPACES = ("aten", "prim", "prims", "kfc_fx")
FUSED = re.compile(r"rnn|lstm|gru")
"""Recurrent layers as one operator."""

SAME_WORK = {
    aten.addmm_: aten.addmm,
    aten.baddbmm_: aten.baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Operators whose work torch counts under another name."""

WITHOUT_TRAFFIC = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.detach,
    aten._unsafe_view,
    aten.lift_fresh,
}

WITHOUT_DATA: dict[object, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda _: 0,
    aten.is_nonzero.default: lambda _: False,
    aten.nonzero.default: lambda x: torch.empty((0, x.ndim), dtype=torch.int64, device="cpu"),
}
"""What the code asks of values, which are not there: whether a decomposition failed. It did not."""
