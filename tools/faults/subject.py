"""The training that faults are put into, and its whole state, to compare bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx

Call = Callable[[], Any]

COUNTED = ("steps", "statistics_steps", "refreshes")
"""Counters that belong to the state; others count faults."""


class Network(nn.Module):
    """A convolution, a norm, two linear layers, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale
        return self.head(self.hidden(features).tanh())  # type: ignore[no-any-return]


@dataclass
class Subject:
    """A network in training, whose batches follow from the number of the step alone."""

    net: Network
    opt: kfc_fx.KFC

    @classmethod
    def started(cls, scaling: str, steps: int = 3, interval: int = 1) -> Subject:
        """After some steps.

        Args:
            interval: steps between statistics, and between refreshes.
        """
        torch.manual_seed(0)
        net = kfc_fx.compile(Network())
        statistics = kfc_fx.Statistics(
            every=interval, refresh_every=interval, fisher="empirical", samples=None
        )
        opt = kfc_fx.KFC(net, scaling=scaling, statistics=statistics, average=5.0, seed=0)
        own = cls(net, opt)
        for _ in range(steps):
            own.step()
        return own

    def saved(self) -> dict[str, Any]:
        """What :meth:`restore` goes back to."""
        return copy.deepcopy({"model": self.net.state_dict(), "opt": self.opt.state_dict()})

    def restore(self, saved: dict[str, Any]) -> None:
        """Go back to what :meth:`saved` returned."""
        self.net.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["opt"])
        self.opt.zero_grad()

    @property
    def number(self) -> int:
        """Of steps that were taken."""
        return self.opt.diagnostics.steps

    def loss(self) -> Tensor:
        """Of the next step's batch."""
        generator = torch.Generator().manual_seed(self.number)
        x = torch.randn(12, 1, 6, 6, generator=generator)
        labels = torch.randint(3, (12,), generator=generator)
        return F.cross_entropy(self.net(x), labels)

    def backward(self) -> None:
        """The gradients of the next step."""
        self.opt.zero_grad()
        self.loss().backward()

    def step(self) -> None:
        """The next step, as a script takes it."""
        self.backward()
        self.opt.step()

    def state(self) -> dict[str, Any]:
        """Parameters, buffers and all that the optimizer saves, but for counts of faults, and for
        what the plan says of each layer: a hook that comes and goes makes another graph."""
        saved = self.opt.state_dict()["state"]
        record = self.opt._models[0].record(self.opt.param_groups)
        record["counters"] = {name: record["counters"][name] for name in COUNTED}
        return {
            "model": {name: value.clone() for name, value in self.net.state_dict().items()},
            "state": {
                key: {name: value for name, value in entry.items() if name != "note"}
                for key, entry in saved.items()
            },
            "record": record,
        }


def equal(found: object, expected: object) -> bool:
    """Bit for bit."""
    if isinstance(found, Tensor):
        return isinstance(expected, Tensor) and torch.equal(found, expected)
    if isinstance(found, dict):
        if not isinstance(expected, dict) or found.keys() != expected.keys():
            return False
        return all(equal(value, expected[name]) for name, value in found.items())
    return found == expected


def quietly(call: Call) -> str:
    """What a call raises, by the name of the error; empty if nothing. Warnings are kept back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except BaseException as error:  # an interrupt too
            return type(error).__name__
    return ""
