"""Who takes part in ``kfc-fx bench train``: the rivals, and KFC with each of its scalings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kfc_fx
from kfc_fx.optim.scalings.table import SCALINGS
from kfc_fx.tools.failures import CommandError, unknown_name
from kfc_fx.tools.race.tasks import TaskSpec

KFC_PREFIX = "kfc-"
SOAP_REFRESH = 10  # as in its paper, and KFC's default too; heavyball's own default is 2
CENTRES = {
    "sgd": 0.03,
    "adamw": 0.003,
    "muon": 0.03,
    "soap": 0.005,
    "psgd": 0.003,
    "kfc-adam": 0.006,
    "kfc-inverse": 0.03,
    "kfc-spectral": 0.04,
    "kfc-eigen": 0.03,
}
"""The rate that each optimizer's grid lies around, on every task and at every batch size."""
RIVAL_TITLES = {
    "sgd": "SGD Nesterov",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "psgd": "PSGD Kron",
}
RIVALS = tuple(RIVAL_TITLES)
SHORTENED = (f"{KFC_PREFIX}adam",)
"""Whose runs are shortened to find how few steps end as low as a rival: the default scaling."""
PUBLISHED = (f"{KFC_PREFIX}eigen", f"{KFC_PREFIX}inverse")
"""Scalings that are there for what others have published: one seed, and no part in short races."""
ENTRANTS = (*RIVALS, *(f"{KFC_PREFIX}{scaling}" for scaling in SCALINGS))


@dataclass(frozen=True)
class Entered:
    """What one training loop calls, and the seconds that capturing the network took.

    ``optimizers`` are stepped one after the other; each keeps its own learning rate.
    """

    network: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    capture_seconds: float


def title(name: str) -> str:
    """The optimizer as tables name it."""
    return RIVAL_TITLES.get(name) or f"KFC {name.removeprefix(KFC_PREFIX)}"


def check_entrants(names: tuple[str, ...]) -> None:
    """Raise :class:`CommandError` for an unknown optimizer."""
    for name in names:
        if name not in ENTRANTS:
            raise unknown_name("optimizer", name, ENTRANTS)


def check_installed(names: tuple[str, ...]) -> None:
    """Raise :class:`CommandError` for an optimizer whose package is not installed."""
    if {"soap", "psgd"} & set(names):
        heavyball()


def heavyball() -> Any:
    """The module heavyball, its own use of torch.compile off: compiling every shape by
    max-autotune would take longer than these runs.

    Raises:
        CommandError: it is not installed.
    """
    try:
        import heavyball
        import heavyball.utils
    except ModuleNotFoundError as error:
        raise CommandError(
            "SOAP and PSGD need heavyball, which is not installed: pip install 'kfc_fx[bench]' "
            "(or leave them out by --optimizers)"
        ) from error
    heavyball.utils.compile_mode = None
    return heavyball


def enter(name: str, network: nn.Module, task: TaskSpec, lr: float, example: Tensor) -> Entered:
    """Make the optimizer ``name`` for ``network``, without weight decay; KFC captures first.

    Args:
        example: a batch of inputs to capture with.
    """
    if name.startswith(KFC_PREFIX):
        return _kfc(name.removeprefix(KFC_PREFIX), network, task, lr, example)
    return Entered(network, MAKERS[name](network, task, lr), 0.0)


class MatrixMuon(torch.optim.Muon):
    """``torch.optim.Muon`` for weights of any rank: those above 2 are views ``[C_out, rest]``.

    torch's own takes 2-d parameters only. The views share the weights' memory, so an update of
    a view is one of the weight; :meth:`step` gives them the weights' gradients.
    """

    def __init__(self, weights: list[Tensor], lr: float) -> None:
        self._weights = weights
        self._views = [weight.detach().view(len(weight), -1) for weight in weights]
        super().__init__(self._views, lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; a weight without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, view in zip(self._weights, self._views, strict=True):
            view.grad = None if weight.grad is None else weight.grad.reshape(view.shape)
        super().step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the weights' gradients; those of the views are set anew by each step."""
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None


def muon_weights(network: nn.Module, head: str | None) -> list[Tensor]:
    """Weights of all linear and convolutional layers but the one called ``head``."""
    return [
        module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name != head
    ]


def _kfc(scaling: str, network: nn.Module, task: TaskSpec, lr: float, example: Tensor) -> Entered:
    started = time.perf_counter()
    compiled = kfc_fx.compile(network, likelihood=task.likelihood)
    kfc_fx.Compilation.of(compiled).trace(example)
    kfc = kfc_fx.KFC(compiled, lr=lr, scaling=scaling)
    return Entered(compiled, (kfc,), time.perf_counter() - started)


def _sgd(network: nn.Module, _: TaskSpec, lr: float) -> tuple[torch.optim.Optimizer, ...]:
    return (torch.optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True),)


def _adamw(network: nn.Module, _: TaskSpec, lr: float) -> tuple[torch.optim.Optimizer, ...]:
    return (torch.optim.AdamW(network.parameters(), lr, weight_decay=0.0),)


def _muon(network: nn.Module, task: TaskSpec, lr: float) -> tuple[torch.optim.Optimizer, ...]:
    weights = muon_weights(network, task.head)
    by_muon = {id(weight) for weight in weights}
    rest = [p for p in network.parameters() if id(p) not in by_muon]
    adamw = torch.optim.AdamW(rest, CENTRES["adamw"], weight_decay=0.0)
    return MatrixMuon(weights, lr), adamw


def _soap(network: nn.Module, _: TaskSpec, lr: float) -> tuple[torch.optim.Optimizer, ...]:
    soap = heavyball().SOAP(
        network.parameters(), lr, weight_decay=0.0, precondition_frequency=SOAP_REFRESH
    )
    return (soap,)


def _psgd(network: nn.Module, _: TaskSpec, lr: float) -> tuple[torch.optim.Optimizer, ...]:
    return (heavyball().PSGDKron(network.parameters(), lr, weight_decay=0.0),)


MAKERS: dict[str, Callable[[nn.Module, TaskSpec, float], tuple[torch.optim.Optimizer, ...]]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": _muon,
    "soap": _soap,
    "psgd": _psgd,
}
