# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Pointwise work on a list of tensors of any sizes in one launch.

The moving average of all factors,

    F ← decay · F + (1 − decay) · F_new,

and the pointwise end of an update, for every parameter θ with its direction d (−lr included),

    v = scale · d − shrink · θ          clip scale, and weight decay as shrink = lr · weight_decay
    p ← momentum · p + v
    θ ← θ + p
    θ̄ ← average_decay · θ̄ + (1 − average_decay) · θ          Polyak average

Addresses and lengths come from a table with one row for each block of ``BLOCK`` elements. The
table is made of numbers alone and cached, so a step whose tensors lie where they lay before
copies nothing to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfc_fx.kernels.triton_case import KernelCase

BLOCK = 2048
ALIGNMENT = 16
ELEMENTS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def block_pointer(entry, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """The address that a table holds, as a pointer."""
    pointer = tl.load(entry).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def average_block(target, source, decay, mask, TARGET: tl.constexpr):
    """The moving average of one block; ``mask`` is None where the block is whole."""
    old = tl.load(target, mask=mask).to(tl.float32)
    new = tl.load(source, mask=mask).to(tl.float32)
    tl.store(target, (decay * old + (1.0 - decay) * new).to(TARGET), mask=mask)


@triton.jit
def moving_average_kernel(
    table, decay, TARGET: tl.constexpr, SOURCE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid ``[blocks]``; ``table`` is ``[blocks, 3]``: target, source, length."""
    entry = table + tl.program_id(0) * 3
    place = tl.arange(0, BLOCK)
    target = block_pointer(entry, TARGET, ALIGNED) + place
    source = block_pointer(entry + 1, SOURCE, ALIGNED) + place
    length = tl.load(entry + 2)
    # A mask of unknown length would keep every access to one element at a time.
    if length == BLOCK:
        average_block(target, source, decay, None, TARGET)
    else:
        average_block(target, source, decay, place < length, TARGET)


@triton.jit
def update_block(
    entry, place, mask, scale, shrink, momentum, average_decay,
    PARAMETER: tl.constexpr, DIRECTION: tl.constexpr, STATE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, HAS_AVERAGE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The end of the update of one block; ``mask`` is None where the block is whole."""
    parameter = block_pointer(entry, PARAMETER, ALIGNED) + place
    direction = block_pointer(entry + 1, DIRECTION, ALIGNED) + place
    theta = tl.load(parameter, mask=mask).to(tl.float32)
    step = tl.load(direction, mask=mask).to(tl.float32) * scale
    step -= shrink * theta
    if HAS_MOMENTUM:
        buffer = block_pointer(entry + 2, STATE, ALIGNED) + place
        step += momentum * tl.load(buffer, mask=mask).to(tl.float32)
        tl.store(buffer, step.to(STATE), mask=mask)
    theta += step
    tl.store(parameter, theta.to(PARAMETER), mask=mask)
    if HAS_AVERAGE:
        average = block_pointer(entry + 2 + HAS_MOMENTUM, STATE, ALIGNED) + place
        mean = tl.load(average, mask=mask).to(tl.float32)
        mean = average_decay * mean + (1.0 - average_decay) * theta
        tl.store(average, mean.to(STATE), mask=mask)


@triton.jit
def update_kernel(
    table, scale, shrink, momentum, average_decay,
    PARAMETER: tl.constexpr, DIRECTION: tl.constexpr, STATE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, HAS_AVERAGE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid ``[blocks]``; ``table`` rows: parameter, direction, [momentum], [average], length.

    ``scale`` is a float32 number on the device, so that a clip never waits for the host.
    """
    columns: tl.constexpr = 3 + HAS_MOMENTUM + HAS_AVERAGE
    entry = table + tl.program_id(0) * columns
    place = tl.arange(0, BLOCK)
    length = tl.load(entry + columns - 1)
    factor = tl.load(scale)
    if length == BLOCK:
        update_block(entry, place, None, factor, shrink, momentum, average_decay, PARAMETER,
                     DIRECTION, STATE, HAS_MOMENTUM, HAS_AVERAGE, ALIGNED)  # fmt: skip
    else:
        update_block(entry, place, place < length, factor, shrink, momentum, average_decay,
                     PARAMETER, DIRECTION, STATE, HAS_MOMENTUM, HAS_AVERAGE, ALIGNED)  # fmt: skip


def moving_average_(factors: Sequence[Tensor], new: Sequence[Tensor], decay: float) -> None:
    """``factors[i] ← decay · factors[i] + (1 − decay) · new[i]`` in place, in one launch.

    Raises:
        ValueError: lists of unequal length, tensors of unequal shape, of mixed dtypes within a
            list or on several devices, or not contiguous.
    """
    table, aligned = _table([factors, new])
    if len(table):
        moving_average_kernel[(len(table),)](
            table, decay, TARGET=ELEMENTS[factors[0].dtype], SOURCE=ELEMENTS[new[0].dtype],
            ALIGNED=aligned, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def update_(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    averages: Sequence[Tensor] | None = None,
    *,
    scale: Tensor,
    shrink: float = 0.0,
    momentum: float = 0.0,
    average_decay: float = 0.0,
) -> None:
    """The pointwise end of an update, in place, in one launch; the equations are above.

    Args:
        parameters, directions: of equal shapes.
        momenta, averages: state, of one dtype; without momenta ``p = v``.
        scale: float32, one element, on the parameters' device.

    Raises:
        ValueError: as for :func:`moving_average_`.
    """
    state = [tensors for tensors in (momenta, averages) if tensors is not None]
    table, aligned = _table([parameters, directions, *state])
    if not len(table):
        return
    dtype = state[0][0].dtype if state else torch.float32
    if any(tensors[0].dtype != dtype for tensors in state):
        raise ValueError("momenta and averages must have one dtype")
    update_kernel[(len(table),)](
        table, scale, shrink, momentum, average_decay,
        PARAMETER=ELEMENTS[parameters[0].dtype], DIRECTION=ELEMENTS[directions[0].dtype],
        STATE=ELEMENTS[dtype], HAS_MOMENTUM=momenta is not None,
        HAS_AVERAGE=averages is not None, ALIGNED=aligned, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def _table(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, bool]:
    """Addresses and lengths of all blocks, and whether every address is 16-byte aligned."""
    first = lists[0]
    for tensors in lists:
        _check(tensors, first)
    if not first:
        return torch.empty((0, 0), dtype=torch.int64), True
    addresses = tuple(tuple(t.data_ptr() for t in tensors) for tensors in lists)
    sizes = tuple(tensors[0].element_size() for tensors in lists)
    lengths = tuple(tensor.numel() for tensor in first)
    aligned = all(address % ALIGNMENT == 0 for row in addresses for address in row)
    return block_table(addresses, sizes, lengths, first[0].device), aligned


def _check(tensors: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    if len(tensors) != len(first):
        raise ValueError(f"lists of {len(first)} and {len(tensors)} tensors")
    for tensor, other in zip(tensors, first, strict=True):
        if tensor.shape != other.shape:
            raise ValueError(f"shapes {tuple(other.shape)} and {tuple(tensor.shape)} differ")
        if tensor.dtype != tensors[0].dtype or tensor.device != first[0].device:
            raise ValueError("the tensors of a list must have one dtype, and all one device")
        if tensor.dtype not in ELEMENTS or not tensor.is_contiguous():
            raise ValueError(
                f"tensors must be contiguous, in float32, bfloat16 or float16; got {tensor.dtype} "
                f"with strides {tensor.stride()}"
            )


@lru_cache(maxsize=64)
def block_table(
    addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """``[blocks, lists + 1]`` int64 on ``device``: a block's address in each list, its length."""
    rows = [torch.arange(0, length, BLOCK) for length in lengths]
    starts = torch.cat(rows)
    owner = torch.repeat_interleave(torch.tensor([len(row) for row in rows]))
    columns = [
        torch.tensor(row)[owner] + starts * size for row, size in zip(addresses, sizes, strict=True)
    ]
    columns.append((torch.tensor(lengths)[owner] - starts).clamp(max=BLOCK))
    return torch.stack(columns, 1).to(device)


def moving_average_reference(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """The moving average of one tensor in plain torch."""
    return decay * old + (1 - decay) * new


def update_reference(
    theta: Tensor,
    direction: Tensor,
    p: Tensor,
    average: Tensor,
    *,
    scale: float,
    shrink: float,
    momentum: float,
    average_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New parameter, momentum and average of one parameter in plain torch."""
    p = momentum * p + scale * direction - shrink * theta
    theta = theta + p
    return theta, p, average_decay * average + (1 - average_decay) * theta


def offline_cases() -> Iterator[KernelCase]:
    """Both kernels, with float32 and bfloat16 parameters."""
    for dtype, element in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        common = {"ALIGNED": True, "BLOCK": BLOCK}
        types = {"table": "*i64", "decay": "fp32"}
        constants = {"TARGET": tl.float32, "SOURCE": element} | common
        yield KernelCase(
            "moving_average", moving_average_kernel, "", dtype, types, constants, frozenset(), 8, 1
        )
        scalars = dict.fromkeys(["shrink", "momentum", "average_decay"], "fp32")
        types = {"table": "*i64", "scale": "*fp32"} | scalars
        constants = {"PARAMETER": element, "DIRECTION": element, "STATE": tl.float32} | common
        constants |= {"HAS_MOMENTUM": True, "HAS_AVERAGE": True}
        yield KernelCase("update", update_kernel, "", dtype, types, constants, frozenset(), 8, 1)
