"""How a way to form Ω is measured: interleaved times, peak extra memory, error in float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.ops import patch_gram

Way = Callable[[Tensor], Tensor]

SECONDS_PER_SHAPE = 2.0
LEAST_ROUNDS = 3
EINCONV_OFFSETS = 9  # with larger or grouped kernels its contraction can need all memory there is


@dataclass(frozen=True)
class Timing:
    """Seconds of one way, and its speed relative to a baseline measured in the same rounds.

    ``ratio`` is the median of baseline time over own time, ``low`` and ``high`` its quartiles.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def ways(geometry: ConvGeometry) -> dict[str, Way]:
    """Every way to form Ω: our methods, two forms of unfold and multiply, einconv if installed."""
    found: dict[str, Way] = {
        method: _ours(geometry, method) for method in ("structured", "im2col", "auto")
    }
    if geometry.ndim == 2 and all(before == after for before, after in geometry.padding):
        found["unfold columns"] = lambda x: unfolded_columns(x, geometry)
        found["unfold rows"] = lambda x: unfolded_rows(x, geometry)
        if find_spec("einconv") and geometry.offsets <= EINCONV_OFFSETS and geometry.groups == 1:
            found["einconv"] = lambda x: einconv_gram(x, geometry)
    return found


def _ours(geometry: ConvGeometry, method: str) -> Way:
    return lambda x: patch_gram(
        x,
        geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        method=method,
    )


def _unfolded(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """``[N, G, D, T]``."""
    patches = F.unfold(
        x,
        geometry.kernel_size,
        padding=tuple(before for before, _ in geometry.padding),
        stride=geometry.stride,
        dilation=geometry.dilation,
    )
    return patches.unflatten(1, (geometry.groups, -1))


def unfolded_columns(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """``A Aᵀ`` with the patches as the columns of A."""
    columns = _unfolded(x, geometry).permute(1, 2, 0, 3).flatten(2)
    return columns @ columns.mT


def unfolded_rows(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """``Aᵀ A`` with the patches as the rows of A."""
    rows = _unfolded(x, geometry).permute(1, 0, 3, 2).flatten(1, 2)
    return rows.mT @ rows


def einconv_gram(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """The KFC factor as einconv's simplified tensor network."""
    from einconv.expressions import convNd_kfc

    equation, operands, shape = convNd_kfc.einsum_expression(
        x,
        geometry.kernel_size,
        stride=geometry.stride,
        padding=tuple(before for before, _ in geometry.padding),
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    return torch.einsum(equation, *operands).reshape(shape)


def timings(
    x: Tensor, candidates: Mapping[str, Way], baselines: tuple[str, ...]
) -> dict[str, Timing]:
    """Time all candidates in turn, several rounds; the fastest of the baselines is the measure."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for way in candidates.values():
        _seconds(way, x)  # plans and caches
    start = time.perf_counter()
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < SECONDS_PER_SHAPE:
        for name, way in candidates.items():
            seconds[name].append(_seconds(way, x))
        rounds += 1
    best = min(baselines, key=lambda name: statistics.median(seconds[name]))
    return {name: _timing(taken, seconds[best]) for name, taken in seconds.items()}


def _timing(taken: list[float], baseline: list[float]) -> Timing:
    ratios = [other / own for own, other in zip(taken, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(statistics.median(taken), middle, low, high)


def _seconds(way: Way, x: Tensor) -> float:
    _synchronise(x)
    start = time.perf_counter()
    way(x)
    _synchronise(x)
    return time.perf_counter() - start


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def peak_extra_bytes(way: Way, x: Tensor) -> int:
    """Most memory allocated at once during a call, its result included."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        way(x)
        return torch.cuda.max_memory_allocated(x.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        way(x)
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def relative_error(way: Way, x: Tensor, geometry: ConvGeometry) -> float:
    """Largest error against float64 over the largest entry, on the first image."""
    part = x[:1]
    reference = unfolded_columns(part.double(), geometry)
    error = (way(part).double() - reference).abs().max() / reference.abs().max()
    return error.item()
