"""The optimizers of ``kfc-fx train``, by name, with the learning rates that suit the demo."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import kfc_fx
from kfc_fx.optim.scalings.table import SCALINGS
from kfc_fx.tools.failures import CommandError, unknown_name

TITLES = {"kfc": "KFC", "sgd": "SGD Nesterov", "adamw": "AdamW"}
LEARNING_RATES = {
    "kfc adam": 0.01,
    "kfc spectral": 0.05,
    "kfc eigen": 0.03,
    "kfc inverse": 0.03,
    "sgd": 0.02,
    "adamw": 0.002,
}
# The best of at least three tried for each optimizer, at the demo's batch size.
DIGITS_NET_RATES = {
    **LEARNING_RATES,
    "kfc spectral": 0.03,
    "sgd": 0.1,
    "adamw": 0.02,
}
# The best of seven tried for SGD and for AdamW, over the demo's 400 steps; KFC's is its default.
AUTOENCODER_RATES = {**LEARNING_RATES, "sgd": 0.05, "adamw": 0.005}
TRIED_RATES = {"digits-net": DIGITS_NET_RATES, "digits-autoencoder": AUTOENCODER_RATES}
MOMENTUM = 0.9


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer to train by: a name of :data:`TITLES`, its peak learning rate, and KFC's
    scaling (``None`` for the others)."""

    name: str
    lr: float
    scaling: str | None = None

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]} ({self.scaling})" if self.scaling else TITLES[self.name]


@dataclass(frozen=True)
class Prepared:
    """What a training loop calls, and the seconds that capturing the network took."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    capture_seconds: float


def specify(
    names: str, lr_options: Iterable[str], scaling: str, model: str | None = None
) -> tuple[OptimizerSpec, ...]:
    """Read the command line's choice of optimizers.

    Args:
        names: of :data:`TITLES`, separated by commas.
        lr_options: each ``name=rate``, or several separated by commas.
        scaling: KFC's, one of :data:`~kfc_fx.optim.scalings.table.SCALINGS`.
        model: name of the network; those of :data:`TRIED_RATES` have default rates of their own.

    Raises:
        CommandError: an unknown or repeated name, or a rate that is not a positive number.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in TITLES:
            raise unknown_name("optimizer", name, TITLES)
    if not chosen or len(set(chosen)) < len(chosen):
        raise CommandError(f"--optimizers {names!r}: name each optimizer once")
    if scaling not in SCALINGS:
        raise unknown_name("scaling", scaling, SCALINGS)
    rates = _overridden(_default_rates(scaling, model), lr_options)
    return tuple(
        OptimizerSpec(name, rates[name], scaling if name == "kfc" else None) for name in chosen
    )


def prepare(
    spec: OptimizerSpec,
    network: nn.Module,
    example: Tensor,
    likelihood: Literal["categorical", "bernoulli"] = "categorical",
) -> Prepared:
    """Make the optimizer for ``network``; for KFC, compile and capture the network first.

    Args:
        example: a batch of images ``[N, C, H, W]`` to capture with.
        likelihood: of the network's output.
    """
    if spec.name == "sgd":
        sgd = torch.optim.SGD(network.parameters(), spec.lr, momentum=MOMENTUM, nesterov=True)
        return Prepared(network, sgd, 0.0)
    if spec.name == "adamw":
        return Prepared(network, torch.optim.AdamW(network.parameters(), spec.lr), 0.0)
    started = time.perf_counter()
    compiled = kfc_fx.compile(network, likelihood=likelihood)
    kfc_fx.Compilation.of(compiled).trace(example)
    kfc = kfc_fx.KFC(compiled, lr=spec.lr, scaling=spec.scaling or "adam")
    return Prepared(compiled, kfc, time.perf_counter() - started)


def _default_rates(scaling: str, model: str | None) -> dict[str, float]:
    known = TRIED_RATES.get(model or "", LEARNING_RATES)
    return {"kfc": known[f"kfc {scaling}"], "sgd": known["sgd"], "adamw": known["adamw"]}


def _overridden(defaults: Mapping[str, float], options: Iterable[str]) -> dict[str, float]:
    rates = dict(defaults)
    for option in ",".join(options).split(","):
        if not option.strip():
            continue
        name, equals, number = (part.strip() for part in option.partition("="))
        if not equals:
            raise CommandError(f"--lr {option!r}: write it as kfc=0.01")
        if name not in rates:
            raise unknown_name("optimizer in --lr", name, rates)
        rates[name] = _positive(option, number)
    return rates


def _positive(option: str, number: str) -> float:
    try:
        rate = float(number)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise CommandError(f"--lr {option!r}: {number!r} is not a positive number")
    return rate
