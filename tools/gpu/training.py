"""Training on a GPU, against the CPU and against the plain way on the same device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.linalg.whitening import cholesky_whitening, newton_schulz_whitening
from kfc_fx.statistics.request import StatisticsRequest
from kfc_fx.tools.gpu.accuracy import matmul_precision

EXAMPLES = 256  # enough that no factor has eigenvalues so close that its basis is arbitrary
STEPS = 8
TINY_STEPS = 2
TINY_SCALINGS = ("adam", "spectral")
EMPIRICAL = kfc_fx.Statistics(fisher="empirical")
TINY_COMPILED = "left out: torch.compile takes long"
CLASSES = 10


@dataclass(frozen=True)
class ScalingCase:
    """A learning rate that trains, and how far two devices may part, relative to the steps."""

    lr: float
    bound: float


# In float32 and float64 on a CPU the parameters part by 4e-7 ("inverse", "eigen"), 4e-5 ("adam",
# which divides by small second moments). On a GPU the polar factor of "spectral" runs in
# bfloat16: with that alone they part by 0.04.
SCALINGS = {
    "adam": ScalingCase(0.01, 2e-3),
    "spectral": ScalingCase(0.02, 0.12),
    "eigen": ScalingCase(0.05, 1e-4),
    "inverse": ScalingCase(0.1, 1e-4),
}
COMPILED_BOUND = 1e-3  # of the "adam" scaling: fused kernels round differently
STATISTICS_BOUND = 1e-4
WHITENING_BOUND = 1e-3


def check_scalings(device: torch.device, tiny: bool) -> str:
    """Every scaling trains as on the CPU, from the same start."""
    parted = {}
    steps, scalings = (TINY_STEPS, TINY_SCALINGS) if tiny else (STEPS, SCALINGS)
    for scaling in scalings:
        there = trained(device, scaling, steps)
        here = trained(torch.device("cpu"), scaling, steps)
        parted[scaling] = difference(there, here)
    lines = ", ".join(f"{scaling} {value:.1e}" for scaling, value in parted.items())
    wrong = [name for name, value in parted.items() if not value <= SCALINGS[name].bound]
    assert not wrong, f"{', '.join(wrong)} out of bounds; parameters part by {lines}"
    return f"parameters part by {lines}"


def check_compiled_update(device: torch.device, tiny: bool) -> str:
    """``compile_update=True`` takes the steps of the generated update as it is."""
    if tiny:
        return TINY_COMPILED
    plain = trained(device, "adam", STEPS)
    compiled = trained(device, "adam", STEPS, compile_update=True)
    parted = difference(compiled, plain)
    assert parted <= COMPILED_BOUND, f"parameters part by {parted:.1e}"
    return f"parameters part by {parted:.1e}"


def check_inductor(device: torch.device, tiny: bool) -> str:
    """Statistics of ``backend="inductor"`` equal those of the eager backend."""
    if tiny:
        return TINY_COMPILED
    eager, compiled = (_statistics(device, backend) for backend in ("eager", "inductor"))
    assert eager.keys() == compiled.keys(), f"{sorted(eager)} and {sorted(compiled)}"
    parted = {
        name: ((compiled[name] - value).norm() / value.norm()).item()
        for name, value in eager.items()
    }
    worst = max(parted, key=lambda name: parted[name])
    wrong = {name: value for name, value in parted.items() if not value <= STATISTICS_BOUND}
    assert not wrong, f"statistics part: {wrong}"
    return f"{len(parted)} statistics, worst {worst} {parted[worst]:.1e}"


def check_autocast(device: torch.device, tiny: bool) -> str:
    """Training under autocast stays finite and lowers the loss; float16 scales its loss."""
    lines = []
    for dtype in (torch.bfloat16, torch.float16):
        losses = _autocast_losses(device, dtype, TINY_STEPS if tiny else STEPS)
        line = f"{dtype}".removeprefix("torch.") + f" {losses[0]:.3f} to {losses[-1]:.3f}"
        assert torch.tensor(losses).isfinite().all(), line
        assert losses[-1] < losses[0], f"the loss did not fall: {line}"
        lines.append(line)
    return "loss in " + ", ".join(lines)


def check_whitening(device: torch.device, tiny: bool) -> str:
    """``W Wᵀ`` by Newton-Schulz, from an older factor, against the inverse by ``eigh``."""
    side, damping = (24 if tiny else 512), 0.1
    torch.manual_seed(0)
    rows = torch.randn(2, 8 * side, side, device=device) + 2
    change = torch.randn(2, 8 * side, side, device=device)
    with _full_precision():
        old = rows.mT @ rows / rows.shape[1]
        new = 0.7 * old + 0.3 * (change.mT @ change) / rows.shape[1]
        start, _ = cholesky_whitening(old, damping)
        found, failed = newton_schulz_whitening(new, start, damping)
    assert not failed.any(), "it fell back to the identity"
    eigenvalues, basis = torch.linalg.eigh(new.double())
    scale = eigenvalues.mean(1)[:, None]
    exact = (basis / (eigenvalues / scale + damping).unsqueeze(1)) @ basis.mT
    wide = found.double()
    parted = ((wide @ wide.mT - exact).norm() / exact.norm()).item()
    assert parted <= WHITENING_BOUND, f"relative difference {parted:.1e}"
    return f"relative difference {parted:.1e}"


def trained(device: torch.device, scaling: str, steps: int, **options: Any) -> Tensor:
    """How far a few steps on one batch move the parameters, on the CPU.

    Targets are the true ones: each device has a random generator of its own.
    """
    network = small_network()
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    x, y = batch(device)
    with _full_precision():
        model = kfc_fx.compile(copy.deepcopy(network).to(device), likelihood="bernoulli")
        optimizer = kfc_fx.KFC(
            model, SCALINGS[scaling].lr, scaling=scaling, statistics=EMPIRICAL, **options
        )
        for _ in range(steps):
            F.binary_cross_entropy_with_logits(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()]) - start


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to that of ``expected``."""
    return ((found - expected).norm() / expected.norm()).item()


def small_network() -> nn.Sequential:
    """Two convolutions and a linear layer, always with the same parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(8 * 9, CLASSES),
    )  # fmt: skip


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 8, 8]`` and independent labels ``[N, 10]``: no output factor is singular."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 3, 8, 8, generator=generator)
    y = torch.rand(EXAMPLES, CLASSES, generator=generator) < 0.5
    return x.to(device), y.float().to(device)


@contextmanager
def _full_precision() -> Iterator[None]:
    with matmul_precision("highest"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _statistics(device: torch.device, backend: str) -> dict[str, Tensor]:
    x, y = batch(device)
    with _full_precision():
        model = kfc_fx.compile(small_network().to(device), likelihood="bernoulli", backend=backend)
        collector = kfc_fx.Compilation.of(model).attach(StatisticsRequest(fisher="empirical"))
        collector.arm()
        F.binary_cross_entropy_with_logits(model(x), y).backward()
    return {
        f"{block} {name}": value
        for block, sums in collector.sums.blocks.items()
        for name, value in sums.items()
    }


def _autocast_losses(device: torch.device, dtype: torch.dtype, steps: int) -> list[float]:
    x, y = batch(device)
    model = kfc_fx.compile(small_network().to(device), likelihood="bernoulli")
    optimizer = kfc_fx.KFC(model, lr=SCALINGS["adam"].lr, scaling="adam")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        with torch.autocast(device.type, dtype):
            loss = F.binary_cross_entropy_with_logits(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
