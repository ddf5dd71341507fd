# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The distinct products of a patch Gram: every autocorrelation once, all in one launch.

    P[slot, g] = Σ_n Σ_{q in box} X_g[first + s·q, n] X_g[second + s·q, n]ᵀ,   [C/G, C/G] each

Activations are packed with the batch innermost and without padding (``triton_pack``), so a job
(``triton_product_jobs``) is a plain matrix product whose operands are two constant offsets into
one buffer: ``C/G`` rows, K over the pixels of its box and the images at each. No patches exist,
nothing is masked but the ends of lines, and parts of unequal jobs fill the device together. A
second launch adds up the parts of slots that have several, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.products import ProductPlan
from kfc_fx.kernels.triton_case import KernelCase, argument_types, gram_cases
from kfc_fx.kernels.triton_configs import (
    PARTIAL_ITEMSIZE,
    RECTANGULAR,
    SCRATCH_BYTES,
    GramConfig,
    default_rectangular,
    fit_stages,
    most_steps,
    precision_mode,
    processor,
)
from kfc_fx.kernels.triton_pack import MAX_SPATIAL, VECTOR_BYTES, Packed, pack
from kfc_fx.kernels.triton_patch_walk import line_place, run_place
from kfc_fx.kernels.triton_product_jobs import (
    JobPlan,
    Schedule,
    job_plan,
    product_schedule,
    total_steps,
)
from kfc_fx.kernels.triton_symmetric import dot_precision, multiply_add

ROWS = 16
LEAST_STEPS = 16
PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def patch_products_kernel(
    x, target, parts, side, groups, tiles_m, tiles_n, batch_vectors, group_step, channel_step,
    line_depth, line_height, stride_width,
    PRECISION: tl.constexpr, STRIDED: tl.constexpr, EVEN_K: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid ``[parts · tiles_m · tiles_n, G]``; ``parts`` is ``[P, 7]`` int64, as ``Part`` is."""
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    part = parts + tl.program_id(0) // (tiles_m * tiles_n) * 7
    group = tl.cast(tl.program_id(1), tl.int64)
    first_place = tl.load(part)
    second_place = tl.load(part + 1)
    box_height = tl.load(part + 2).to(tl.int32)
    box_width = tl.load(part + 3).to(tl.int32)
    first_step = tl.load(part + 4).to(tl.int32)
    last_step = tl.load(part + 5).to(tl.int32)
    slot = tl.load(part + 6)
    padded_batch = batch_vectors * UNIT
    length = box_width * padded_batch
    steps_per_line = tl.cdiv(length, BLOCK_K)
    skipped = (stride_width - 1) * padded_batch
    rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x += group * group_step * padded_batch
    left_place = (first_place + rows.to(tl.int64) * channel_step) * padded_batch
    right_place = (second_place + columns.to(tl.int64) * channel_step) * padded_batch
    left = x + left_place[:, None]
    right = x + right_place[None, :]
    row_exists = (rows < side)[:, None]
    column_exists = (columns < side)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first_step, last_step):
        line = line_place(step, steps_per_line, box_height, line_depth, line_height)
        run, place = run_place(step, steps_per_line, padded_batch, skipped, STRIDED, BLOCK_K)
        line *= padded_batch
        if EVEN_K:
            a = tl.load(left + line + place[None, :], mask=row_exists, other=0.0)
            b = tl.load(right + line + place[:, None], mask=column_exists, other=0.0)
        else:
            here = run < length
            a = tl.load(left + line + place[None, :], mask=row_exists & here[None, :], other=0.0)
            b = tl.load(right + line + place[:, None], mask=column_exists & here[:, None],
                        other=0.0)  # fmt: skip
        total = multiply_add(a, b, total, PRECISION)
    matrix = target + (slot * groups + group) * side * side
    tl.store(matrix + rows[:, None] * side + columns[None, :], total,
             mask=row_exists & column_exists)  # fmt: skip


@triton.jit
def slot_sum_kernel(
    target, sums, bounds, side, groups, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid ``[slots to sum, row blocks · column blocks, G]``.

    ``bounds`` is ``[slots to sum, 4]``: slot, symmetric, begin and end of its targets in ``sums``.
    """
    entry = bounds + tl.program_id(0) * 4
    group = tl.cast(tl.program_id(2), tl.int64)
    blocks = tl.cdiv(side, BLOCK)
    row = (tl.program_id(1) // blocks * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    slot = tl.load(entry)
    symmetric = tl.load(entry + 1) != 0
    # A symmetric slot takes both halves from its lower one, so that it is so to the last bit.
    upper = symmetric & (row < column)
    place = tl.where(upper, column * side + row, row * side + column)
    inside = (row < side) & (column < side)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)):
        matrix = target + (tl.load(sums + i) * groups + group) * side * side
        total += tl.load(matrix + place, mask=inside, other=0.0)
    matrix = target + (slot * groups + group) * side * side
    tl.store(matrix + (row * side + column), total, mask=inside)


def patch_products(
    x: Tensor,
    plan: ProductPlan,
    stride: tuple[int, ...],
    groups: int,
    *,
    config: GramConfig | None = None,
) -> Tensor:
    """The slots of ``x`` in float32.

    Args:
        x: ``[N, C, *spatial]`` in float32, bfloat16 or float16, any strides.
        plan: of the convolution's geometry on this map.
        stride, groups: of the convolution.
        config: tile sizes; by default chosen for the shape.

    Returns:
        ``[slots, G, C/G, C/G]``; slots of a diagonal block are symmetric to the last bit.

    Raises:
        TypeError: another dtype.
    """
    mode = precision_mode(x.dtype)
    side = x.shape[1] // groups
    slots = len(plan.slots)
    if x.numel() == 0 or slots == 0:
        return x.new_zeros((slots, groups, side, side), dtype=torch.float32)
    shared_bytes = processor(x).shared_bytes
    config = config or default_rectangular(side, mode, shared_bytes)
    config = fit_stages(config, x.element_size(), shared_bytes)
    packed = pack(x, _bare(stride, groups), round_tf32=mode == "tf32")
    return packed_products(packed, job_plan(plan), stride, tuple(x.shape[2:]), groups, config, mode)


def packed_products(
    packed: Packed,
    jobs: JobPlan,
    stride: tuple[int, ...],
    spatial: tuple[int, ...],
    groups: int,
    config: GramConfig,
    mode: str,
) -> Tensor:
    """The same from activations that are packed already, without padding."""
    side = packed.channels // groups
    tiles = (-(-side // config.block_m), -(-side // config.block_n))
    schedule = _schedule(
        jobs, stride, spatial, packed.padded_batch, config.block_k, (side, groups),
        tiles[0] * tiles[1] * groups, processor(packed.buffer).count,
    )  # fmt: skip
    target = packed.buffer.new_empty((schedule.targets, groups, side, side), dtype=torch.float32)
    tables = schedule_tables(schedule, jobs, packed.buffer.device)
    _launch(packed, target, tables[0], stride, groups, config, mode, tiles)
    _sum_slots(target, tables[1], tables[2])
    return target[: schedule.slots]


@lru_cache(maxsize=512)
def _bare(stride: tuple[int, ...], groups: int) -> ConvGeometry:
    ndim = len(stride)
    return ConvGeometry((1,) * ndim, stride, ((0, 0),) * ndim, (1,) * ndim, groups)


@lru_cache(maxsize=512)
def _schedule(
    jobs: JobPlan,
    stride: tuple[int, ...],
    spatial: tuple[int, ...],
    padded_batch: int,
    block_k: int,
    result: tuple[int, int],
    programs: int,
    processors: int,
) -> Schedule:
    """The schedule that fills the device, with parts as short as accuracy asks for.

    ``result`` is the side of a product and the groups, ``programs`` how many make a part.
    """
    steps = total_steps(jobs, padded_batch, block_k)
    filling = max(LEAST_STEPS, -(-steps * programs // (processors * PROGRAMS_PER_PROCESSOR)))
    side, groups = result
    affordable = SCRATCH_BYTES // (PARTIAL_ITEMSIZE * groups * side**2)
    accurate = max(most_steps(block_k), -(-steps // max(1, affordable)))
    length = min(filling, accurate)
    return product_schedule(jobs, stride, spatial, padded_batch, block_k, length)


@lru_cache(maxsize=512)
def schedule_tables(
    schedule: Schedule, jobs: JobPlan, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The schedule on a device: ``parts [P, 7]``, ``bounds [slots to sum, 4]``, ``sums``.

    Cached, so that the copy from the host happens once for a layer and batch size.
    """
    parts = [
        (p.first, p.second, p.box_height, p.box_width, p.first_step, p.last_step, p.target)
        for p in schedule.parts
    ]
    bounds, sums = [], list[int]()
    for slot, targets in schedule.sums:
        bounds.append((slot, int(jobs.symmetric[slot]), len(sums), len(sums) + len(targets)))
        sums.extend(targets)
    return (
        torch.tensor(parts, dtype=torch.int64, device=device).reshape(-1, 7),
        torch.tensor(bounds, dtype=torch.int64, device=device).reshape(-1, 4),
        torch.tensor(sums, dtype=torch.int64, device=device),
    )


def _launch(
    packed: Packed,
    target: Tensor,
    parts: Tensor,
    stride: tuple[int, ...],
    groups: int,
    config: GramConfig,
    mode: str,
    tiles: tuple[int, int],
) -> None:
    if not parts.shape[0]:
        return
    _, depth, height, width, _ = packed.buffer.shape
    steps = (1,) * (MAX_SPATIAL - len(stride)) + stride
    pixels = depth * height * width
    side = packed.channels // groups
    patch_products_kernel[(parts.shape[0] * tiles[0] * tiles[1], groups)](
        packed.buffer, target, parts, side, groups, *tiles,
        packed.padded_batch // packed.unit, side * pixels, pixels,
        steps[0] * height * width, steps[1] * width, steps[2],
        PRECISION=dot_precision(mode), STRIDED=steps[2] > 1, UNIT=packed.unit,
        EVEN_K=packed.padded_batch % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _sum_slots(target: Tensor, bounds: Tensor, sums: Tensor) -> None:
    if not bounds.shape[0]:
        return
    _, groups, side, _ = target.shape
    block = min(128, 1 << (side - 1).bit_length())
    grid = (bounds.shape[0], -(-side // ROWS) * -(-side // block), groups)
    slot_sum_kernel[grid](target, sums, bounds, side, groups, ROWS=ROWS, BLOCK=block, num_warps=4)


def patch_products_reference(
    x: Tensor, plan: ProductPlan, stride: tuple[int, ...], groups: int
) -> Tensor:
    """The same in plain torch, in the dtype of ``x`` or float32, whichever is wider."""
    wide = x.to(statistic_dtype(x)).unflatten(1, (groups, -1))
    slots = wide.new_zeros((len(plan.slots), groups, wide.shape[2], wide.shape[2]))
    for slot, axes in zip(slots, plan.slots, strict=True):
        here, there = [], []
        for axis, step in zip(axes, stride, strict=True):
            pixels = torch.arange(axis.start, axis.stop, device=x.device) * step
            here.append(pixels + axis.phase)
            there.append(pixels + axis.other_phase + step * axis.shift)
        first, second = _gather(wide, here), _gather(wide, there)
        slot.copy_(torch.einsum("ngck,ngdk->gcd", first, second))
    return slots


def _gather(x: Tensor, pixels: list[Tensor]) -> Tensor:
    for axis, index in enumerate(pixels):
        x = x.index_select(3 + axis, index)
    return x.flatten(3) if pixels else x.unsqueeze(3)


def offline_cases() -> Iterator[KernelCase]:
    """With strides and ends to mask, and with neither; then the sums of slots."""
    names = patch_products_kernel.arg_names
    integers = " ".join(names[names.index("side") : names.index("PRECISION")])
    types = argument_types({"i32": integers, "*fp32": "target", "*i64": "parts"})
    for mode in RECTANGULAR:
        unit = VECTOR_BYTES // (2 if mode == "half" else 4)
        variants = {
            "even": (types, {"UNIT": unit, "STRIDED": False, "EVEN_K": True}),
            "strided": (types, {"UNIT": unit, "STRIDED": True, "EVEN_K": False}),
        }
        only = {name: RECTANGULAR[name] if name == mode else () for name in RECTANGULAR}
        divisible = frozenset(["side"])
        yield from gram_cases("patch_products", patch_products_kernel, only, variants, divisible)
    types = argument_types({"i32": "side groups", "*fp32": "target", "*i64": "sums bounds"})
    constants = {"ROWS": ROWS, "BLOCK": 128}
    yield KernelCase(
        "slot_sum", slot_sum_kernel, "128", "fp32", types, constants, frozenset(["side"]), 4, 1
    )
