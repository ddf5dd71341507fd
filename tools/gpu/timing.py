"""How fast the statistics are on a GPU, each beside the plain way in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.kernels.geometry import ConvGeometry, conv_geometry
from kfc_fx.kernels.triton_configs import precision_mode, processor
from kfc_fx.kernels.triton_cost import estimate
from kfc_fx.ops import cuda_dispatch
from kfc_fx.ops.convolution import encoded
from kfc_fx.tools.gpu.clock import NotCapturedError, copies, device_time, host_time

METHODS = ("structured", "im2col", "auto")
CLOCKS = ("host", "device")
UNFOLDED_BYTES = 12 << 30  # the plain way is left out above this


@dataclass(frozen=True)
class Layer:
    """One convolution of a known network, at a batch size, and its output channels."""

    name: str
    shape: tuple[int, int, int, int]
    geometry: ConvGeometry
    outputs: int

    @property
    def output_shape(self) -> tuple[int, ...]:
        """``[N, C_out, *spatial]``."""
        return (self.shape[0], self.outputs, *self.geometry.output_size(self.shape[2:]))

    @property
    def locations(self) -> int:
        """Number of patches."""
        return self.shape[0] * prod(self.output_shape[2:])

    @property
    def products(self) -> int:
        """Multiplications of the plain way to Ω."""
        return self.locations * (self.shape[1] * self.geometry.offsets) ** 2


def _conv(kernel: int, stride: int = 1) -> ConvGeometry:
    return conv_geometry((kernel, kernel), stride=stride, padding=kernel // 2)


LAYERS = (
    Layer("ResNet-18 stem, 32", (128, 3, 32, 32), _conv(3), 64),
    Layer("ResNet-18 64, 32", (128, 64, 32, 32), _conv(3), 64),
    Layer("ResNet-18 128, 16", (128, 128, 16, 16), _conv(3), 128),
    Layer("ResNet-18 256, 8", (128, 256, 8, 8), _conv(3), 256),
    Layer("ResNet-18 512, 4", (128, 512, 4, 4), _conv(3), 512),
    Layer("ResNet-50 stem, 224", (64, 3, 224, 224), _conv(7, 2), 64),
    Layer("ResNet-50 64, 56", (64, 64, 56, 56), _conv(3), 64),
    Layer("ResNet-50 128, 28", (64, 128, 28, 28), _conv(3), 128),
    Layer("ResNet-50 256, 14", (64, 256, 14, 14), _conv(3), 256),
    Layer("ResNet-50 512, 7", (64, 512, 7, 7), _conv(3), 512),
    Layer("ResNet-50 256 1x1, 56", (64, 256, 56, 56), _conv(1), 64),
    Layer("VGG-16 128, 112", (16, 128, 112, 112), _conv(3), 128),
    Layer("CIFAR-10 net 32 k5, 15", (128, 32, 15, 15), _conv(5), 32),
)


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matmul by dtype, and GB/s of a copy: what this GPU reaches at all."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        time = host_time([partial(torch.matmul, a, a)], device).median
        found[f"matmul {dtype} TFLOP/s"] = 2 * 8192**3 / time / 1e9
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    time = host_time([lambda: target.copy_(source)], device).median
    found["copy GB/s"] = 2 * source.numel() * 4 / time / 1e6
    return found


def layer_timings(
    layer: Layer, dtype: torch.dtype, device: torch.device, ceiling: dict[str, float]
) -> dict[str, Any]:
    """Every way to a layer's statistics by both clocks, against the plain way.

    Returns:
        ``times``: milliseconds by contender and clock; ``ratios``: the plain way's time over the
        contender's, ``F.unfold`` and a matmul for the input side, a matmul for the gradients;
        ``share of matmul``: the rate on the device, in the plain way's multiplications, over
        that of a large matmul; ``peak bytes``; ``work``: what the estimate knows of each method.
    """
    inputs = _rotation(layer.shape, dtype, device)
    gradients = _rotation(layer.output_shape, dtype, device)
    times = {
        name: timed(
            [partial(call, x) for x in (gradients if "gradient" in name else inputs)], device
        )
        for name, call in contenders(layer, dtype).items()
    }
    row: dict[str, Any] = {"shape": layer.shape, "inputs in turn": len(inputs), "times": times}
    row["ratios"] = {
        name: _ratios(times.get(_baseline(name), {}), found) for name, found in times.items()
    }
    row["share of matmul"] = {
        name: 2 * layer.products / times[name]["device"]["median"] / 1e9
        / ceiling[f"matmul {dtype} TFLOP/s"]
        for name in METHODS if "device" in times[name]
    }  # fmt: skip
    row["peak bytes"] = {
        name: _peak_bytes(partial(contenders(layer, dtype)[name], inputs[0]), device)
        for name in METHODS
    }
    if not layer.geometry.is_pointwise:  # which takes the row Gram by either method
        cost = estimate(
            layer.geometry, layer.shape, precision_mode(dtype), processor(inputs[0]).shared_bytes
        )
        row["mode"] = cost.mode
        row["work"] = {"structured": asdict(cost.structured), "im2col": asdict(cost.im2col)}
        row["chosen"] = cost.best
    return row


def contenders(layer: Layer, dtype: torch.dtype) -> dict[str, Callable[[Tensor], object]]:
    """What is timed, by name: functions of the input, or of the gradient where the name says so."""
    geometry, numbers = layer.geometry, encoded(layer.geometry)
    found: dict[str, Callable[[Tensor], object]] = {}
    if layer.locations * layer.shape[1] * geometry.offsets * dtype.itemsize < UNFOLDED_BYTES:
        found["unfold"] = lambda x: plain_gram(x, geometry)
    for method in METHODS:
        found[method] = lambda x, method=method: cuda_dispatch.patch_gram(  # type: ignore[misc]
            x, numbers, False, method
        )
    found["slots"] = lambda x: cuda_dispatch.product_slots(x, geometry, False)
    found["separable"] = lambda x: torch.ops.kfc_fx.separable_gram.default(x, numbers)
    found["plain gradient"] = plain_gradient_gram
    found["gradient"] = lambda g: cuda_dispatch.row_gram(g.movedim(1, -1), False)
    return found


def plain_gram(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """``F.unfold`` and a matmul, in the dtype of ``x``: the plain way to Ω."""
    padding = tuple(pad[0] for pad in geometry.padding)
    patches = F.unfold(x, geometry.kernel_size, geometry.dilation, padding, geometry.stride)
    rows = patches.transpose(0, 1).flatten(1)
    return rows @ rows.mT


def plain_gradient_gram(gradient: Tensor) -> Tensor:
    """A matmul of ``[N, C, *spatial]``, in its dtype: the plain way to Γ."""
    rows = gradient.movedim(1, -1).flatten(0, -2)
    return rows.mT @ rows


def timed(calls: Sequence[Callable[[], object]], device: torch.device) -> dict[str, Any]:
    """Milliseconds by both clocks; ``not captured`` says why there is none of the device."""
    found: dict[str, Any] = {"host": asdict(host_time(calls, device))}
    try:
        found["device"] = asdict(device_time(calls, device))
    except NotCapturedError as error:
        found["not captured"] = str(error)
    return found


def _rotation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    first = torch.randn(shape, device=device).to(dtype)
    return [first] + [first.clone() for _ in range(copies(first.nbytes, device) - 1)]


def _baseline(name: str) -> str:
    return "plain gradient" if "gradient" in name else "unfold"


def _ratios(plain: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    return {
        clock: plain[clock]["median"] / found[clock]["median"]
        for clock in CLOCKS
        if clock in plain and clock in found
    }


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def step_timings(device: torch.device, batch: int = 256, warm_up: int = 20) -> dict[str, float]:
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

    found = {"SGD step ms": host_time([lambda: step(network, sgd)], device).median}
    for interval, label in ((1, "every step"), (10, "every tenth step")):
        model = kfc_fx.compile(small_residual_network().to(device))
        statistics = kfc_fx.Statistics(every=interval, refresh_every=1_000_000)
        optimizer = kfc_fx.KFC(model, lr=1e-3, statistics=statistics)
        for _ in range(warm_up):
            step(model, optimizer)
        optimizer.diagnostics.steps = optimizer.schedule.early_phase + 1  # no refresh from here on
        times = [host_time([partial(step, model, optimizer)], device).median for _ in range(3)]
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
