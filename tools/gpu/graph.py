"""The update as a CUDA graph: equal to the update launch by launch, and waiting for nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import kfc_fx
from kfc_fx.errors import KfcWarning
from kfc_fx.tools.gpu.training import COMPILED_BOUND, SCALINGS, difference, trained

WARM_UP = 34  # with INTERVAL, steps 34 to 40 are the first seven in a row without statistics
STEPS = 6
INTERVAL = 1_000
# Rates and bias corrections are float32 numbers in a graph, as in a compiled update; and the polar
# factor of "spectral", in bfloat16, turns any rounding into one of its own.
BOUNDS = {
    "adam": COMPILED_BOUND,
    "spectral": SCALINGS["spectral"].bound,
    "eigen": 1e-5,
    "inverse": 1e-5,
}


def check_cuda_graph(device: torch.device, tiny: bool) -> str:
    """Replayed steps equal launched ones; between refreshes they never wait for the device; one
    on gradients that are not finite changes nothing."""
    if device.type != "cuda":
        return "left out: needs a GPU"
    parted = {}
    for scaling in SCALINGS:
        replayed = trained(device, scaling, WARM_UP, cuda_graph=True)
        parted[scaling] = difference(replayed, trained(device, scaling, WARM_UP, cuda_graph=False))
    lines = ", ".join(f"{scaling} {value:.1e}" for scaling, value in parted.items())
    wrong = [name for name, value in parted.items() if not value <= BOUNDS[name]]
    assert not wrong, f"{', '.join(wrong)} out of bounds; parameters part by {lines}"
    for scaling in SCALINGS:
        _never_waits(device, scaling)
    return f"parameters part by {lines}; launches {launches(device)}"


def launches(device: torch.device) -> dict[str, int]:
    """Launches from the host of one ordinary update of ResNet-50's 161 parameters: as a graph,
    eager, and by torch's own loop over parameters for AdamW."""
    found = {}
    for name, graph in (("graph", True), ("eager", False)):
        optimizer, step = _resnet50_training(device, graph)
        for _ in range(WARM_UP):
            step()
        found[name] = _count(optimizer.step)
    network = resnet50_shaped().to(device)
    assert len(list(network.parameters())) == 161
    loop = torch.optim.AdamW(network.parameters(), lr=1e-3, foreach=False)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loop.step()
    found["loop AdamW"] = _count(loop.step)
    return found


def resnet50_shaped(width: int = 64) -> nn.Module:
    """The layers of ResNet-50 in a row: its 161 parameters, without its connections.

    Args:
        width: channels of the first layer, 64 in ResNet-50; all others are in proportion.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    before = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            after = 4 * width
            stride = 2 if stage and not block else 1
            shapes = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
            if not block:
                shapes.append((after, after, 1, 1))  # where the shortcut's projection is
            for inputs, outputs, kernel, step in shapes:
                layers.append(nn.Conv2d(inputs, outputs, kernel, step, kernel // 2, bias=False))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            before = after
        width *= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


def _resnet50_training(device: torch.device, graph: bool) -> tuple[kfc_fx.KFC, Callable[[], None]]:
    """The optimizer, and what takes one whole step."""
    torch.manual_seed(0)
    model = kfc_fx.compile(resnet50_shaped().to(device))
    optimizer = kfc_fx.KFC(model, lr=1e-4, cuda_graph=graph)
    x = torch.randn(4, 3, 64, 64, device=device)
    y = torch.randint(1000, (4,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return optimizer, step


def _count(call: Callable[[], object]) -> int:
    """Launches of kernels, copies and graphs that a call makes from the host."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
    return sum(event.name.startswith(names) for event in profiler.events() or ())


def _never_waits(device: torch.device, scaling: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 9, 10), nn.PReLU(),
    ).to(device)  # fmt: skip
    model = kfc_fx.compile(network)
    optimizer = kfc_fx.KFC(
        model,
        lr=0.01,
        scaling=scaling,
        statistics=kfc_fx.Statistics(every=INTERVAL, refresh_every=INTERVAL),
        cuda_graph=True,
        weight_decay=0.01,
    )
    x = torch.randn(32, 3, 8, 8, device=device)
    y = torch.randint(10, (32,), device=device)

    def step(scale: float = 1.0) -> None:
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * scale).backward()
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    with _no_waiting():
        for number in range(STEPS):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
            step()
        before = [parameter.detach().clone() for parameter in network.parameters()]
        step(float("nan"))
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new), f"{scaling}: a step on NaN changed the parameters"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KfcWarning)
        assert optimizer.diagnostics.skipped_steps == 1, f"{scaling}: no step was skipped"
    step()
    assert all(parameter.isfinite().all() for parameter in network.parameters()), scaling


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make every synchronisation of the host with the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
