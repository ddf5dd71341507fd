"""How fast the statistics are on a GPU, each beside the plain way in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.ops import cuda_dispatch
from kfc_fx.ops.convolution import encoded
from kfc_fx.plan.geometry import ConvGeometry, conv_geometry

REPEATS = 15
WARM_UP = 3
UNFOLDED_BYTES = 12 << 30  # the plain way is left out above this


@dataclass(frozen=True)
class Layer:
    """One convolution of a known network, at a batch size."""

    name: str
    shape: tuple[int, int, int, int]
    geometry: ConvGeometry


def _conv(kernel: int, stride: int = 1) -> ConvGeometry:
    return conv_geometry((kernel, kernel), stride=stride, padding=kernel // 2)


LAYERS = (
    Layer("ResNet-18 stem, 32", (128, 3, 32, 32), _conv(3)),
    Layer("ResNet-18 64, 32", (128, 64, 32, 32), _conv(3)),
    Layer("ResNet-18 128, 16", (128, 128, 16, 16), _conv(3)),
    Layer("ResNet-18 256, 8", (128, 256, 8, 8), _conv(3)),
    Layer("ResNet-18 512, 4", (128, 512, 4, 4), _conv(3)),
    Layer("ResNet-50 stem, 224", (64, 3, 224, 224), _conv(7, 2)),
    Layer("ResNet-50 64, 56", (64, 64, 56, 56), _conv(3)),
    Layer("ResNet-50 128, 28", (64, 128, 28, 28), _conv(3)),
    Layer("ResNet-50 256, 14", (64, 256, 14, 14), _conv(3)),
    Layer("ResNet-50 512, 7", (64, 512, 7, 7), _conv(3)),
    Layer("ResNet-50 256 1x1, 56", (64, 256, 56, 56), _conv(1)),
    Layer("VGG-16 128, 112", (16, 128, 112, 112), _conv(3)),
    Layer("CIFAR-10 net 32 k5, 15", (128, 32, 15, 15), _conv(5)),
)


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of one call, in milliseconds."""

    median: float
    low: float
    high: float


def measure(call: Callable[[], object], device: torch.device) -> Timing:
    """Time ``call`` by events of the device, after a warm-up."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end))
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high)


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matmul by dtype, and GB/s of a copy: what this GPU reaches at all."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        time = measure(partial(torch.matmul, a, a), device).median
        found[f"matmul {dtype} TFLOP/s"] = 2 * 8192**3 / time / 1e9
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    time = measure(lambda: target.copy_(source), device).median
    found["copy GB/s"] = 2 * source.numel() * 4 / time / 1e6
    return found


def layer_timings(
    layer: Layer, dtype: torch.dtype, device: torch.device, ceiling: dict[str, float]
) -> dict[str, object]:
    """Each method and the slots alone, against ``F.unfold`` and a matmul."""
    x = torch.randn(layer.shape, device=device).to(dtype)
    numbers = encoded(layer.geometry)
    row: dict[str, object] = {"layer": layer.name, "shape": layer.shape, "dtype": str(dtype)}
    plain = None
    if _unfolded_bytes(layer, x) < UNFOLDED_BYTES:
        plain = measure(lambda: plain_gram(x, layer.geometry), device)
        row["unfold ms"] = plain.median
    flops = 2 * _locations(layer) * (layer.shape[1] * layer.geometry.offsets) ** 2
    for method in ("structured", "im2col", "auto"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        timing = measure(partial(cuda_dispatch.patch_gram, x, numbers, False, method), device)
        row[f"{method} ms"] = timing.median
        row[f"{method} quartiles"] = (timing.low, timing.high)
        row[f"{method} peak bytes"] = torch.cuda.max_memory_allocated(device) - before
        row[f"{method} TFLOP/s as unfold counts"] = flops / timing.median / 1e9
        row[f"{method} share of matmul"] = (
            flops / timing.median / 1e9 / ceiling[f"matmul {dtype} TFLOP/s"]
        )
        row[f"{method} ratio"] = plain.median / timing.median if plain else None
    slots = measure(lambda: cuda_dispatch.patch_products(x, numbers, False), device)
    row["slots ms"] = slots.median
    row["slots ratio"] = plain.median / slots.median if plain else None
    return row


def plain_gram(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """``F.unfold`` and a matmul, in the dtype of ``x``: the plain way to Ω."""
    padding = tuple(pad[0] for pad in geometry.padding)
    patches = F.unfold(x, geometry.kernel_size, geometry.dilation, padding, geometry.stride)
    rows = patches.transpose(0, 1).flatten(1)
    return rows @ rows.mT


def step_timings(device: torch.device, batch: int = 256) -> dict[str, float]:
    """Milliseconds of a plain step and of a step with statistics, on a plain residual network."""
    torch.manual_seed(0)
    network = small_residual_network().to(device)
    x = torch.randn(batch, 3, 32, 32, device=device)
    y = torch.randint(10, (batch,), device=device)
    sgd = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {"SGD step ms": measure(lambda: step(network, sgd), device).median}
    for interval, label in ((1, "every step"), (10, "every tenth step")):
        model = kfc_fx.compile(small_residual_network().to(device))
        optimizer = kfc_fx.KFC(model, lr=1e-3, factor_interval=interval, inverse_interval=1_000_000)
        for _ in range(20):
            step(model, optimizer)
        times = [measure(partial(step, model, optimizer), device).median for _ in range(3)]
        found[f"KFC step, statistics {label}, ms"] = sum(times) / 3
    return found


def small_residual_network() -> nn.Module:
    """Three stages of 3x3 convolutions with shortcuts, for images of 32x32."""

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(before, after, 3, stride, 1)
            self.second = nn.Conv2d(after, after, 3, 1, 1)
            self.shortcut = nn.Conv2d(before, after, 1, stride)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1), nn.ReLU(), Block(64, 64, 1), Block(64, 128, 2),
        Block(128, 256, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def _locations(layer: Layer) -> int:
    return layer.shape[0] * prod(layer.geometry.output_size(layer.shape[2:]))


def _unfolded_bytes(layer: Layer, x: Tensor) -> int:
    return _locations(layer) * layer.shape[1] * layer.geometry.offsets * x.element_size()
