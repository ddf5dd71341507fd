"""How the CPU computes each statistic: the calls that an emission makes, and why that way.

The statistics ops are intercepted while an emission runs on tensors without data. Each call is
priced by the cost model that also chooses when the op runs in earnest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfc_fx.inspect.counting import Work, WorkCounter
from kfc_fx.kernels import cpu_patch_gram, cpu_row_gram, cpu_separable_gram
from kfc_fx.kernels.cpu_cost import Cost, estimate
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.products import product_plan
from kfc_fx.ops.convolution import decoded

ops: Any = torch.ops.kfc_fx


@dataclass(frozen=True)
class OpCall:
    """One call of a statistics op: on what, by which method, for what reason."""

    op: str
    shape: tuple[int, ...]
    offsets: int
    method: str
    why: str
    milliseconds: float | None = None
    """Estimate of the cost model; None where there was nothing to choose."""


def patch_method(shape: tuple[int, ...], geometry: ConvGeometry) -> tuple[str, str, float | None]:
    """Method, reason and estimated milliseconds of a patch Gram of ``[N, C, *spatial]``."""
    if geometry.is_pointwise:
        return "row", "patches are the pixels themselves, multiplied where they lie", None
    probe = torch.empty(shape, device="meta")
    lifted, within = cpu_patch_gram.with_two_axes(probe, geometry)
    plan = product_plan(within, tuple(lifted.shape[2:]))
    cost = estimate(within, plan, tuple(lifted.shape))
    return cost.best, _comparison(cost), _nanoseconds(cost)[cost.best] / 1e6


def counted_call(counter: WorkCounter, run: Callable[[], Any]) -> Work:
    """The work of ``run`` alone, under a counter that may have counted before."""
    before = counter.work
    with counter:
        run()
    after = counter.work
    return Work(after.flops - before.flops, after.bytes - before.bytes)


class StatisticsObserver:
    """Runs the CPU's implementations in place of the ops, and notes every call."""

    def __init__(self) -> None:
        self.calls: list[OpCall] = []
        self.counter: WorkCounter = WorkCounter(
            {
                ops.patch_gram.default: self._patch_gram,
                ops.row_gram.default: self._row_gram,
                ops.grouped_row_gram.default: self._grouped_row_gram,
                ops.separable_gram.default: self._separable_gram,
            }
        )

    def _patch_gram(self, x: Tensor, numbers: list[int], bias: bool, method: str) -> Tensor:
        geometry = decoded(numbers)
        chosen = patch_method(tuple(x.shape), geometry)
        self._note("patch_gram", x, geometry.offsets, *chosen)
        return cpu_patch_gram.patch_gram(x, geometry, bias=bias, method=method)

    def _row_gram(self, x: Tensor, bias: bool) -> Tensor:
        self._note("row_gram", x, 1, "row", "rows are multiplied where they lie")
        return cpu_row_gram.row_gram(x, bias=bias)

    def _grouped_row_gram(self, x: Tensor, ends: Tensor, bias: bool) -> Tensor:
        self._note("grouped_row_gram", x, 1, "row", "each group's rows where they lie")
        # Which group a row is of is data; however they are divided, the work is the same.
        parts = x.tensor_split(len(ends))
        return torch.stack([cpu_row_gram.row_gram(part, bias=bias) for part in parts])

    def _separable_gram(self, x: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        geometry = decoded(numbers)
        groups = geometry.groups
        maps = (x.shape[0] * x.shape[1] // groups, groups, *x.shape[2:])
        method, why, milliseconds = patch_method(maps, geometry)
        why = f"channels by one weighted product; offsets as maps of one channel: {why}"
        self._note("separable_gram", x, geometry.offsets, f"row + {method}", why, milliseconds)
        return cpu_separable_gram.separable_gram(x, geometry)

    def _note(self, op: str, x: Tensor, offsets: int, *chosen: Any) -> None:
        self.calls.append(OpCall(op, tuple(map(int, x.shape)), offsets, *chosen))


def _nanoseconds(cost: Cost) -> dict[str, float]:
    return {"structured": cost.structured, "lines": cost.lines, "im2col": cost.im2col}


def _comparison(cost: Cost) -> str:
    times = sorted(_nanoseconds(cost).items(), key=lambda item: item[1])
    return "estimated " + ", ".join(f"{name} {ns / 1e6:.3g} ms" for name, ns in times)
