"""Train one step by a loss, and compare what was found with what is known."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

import kfc_fx
from kfc_fx.tools.losses.case import LossCase


@dataclass(frozen=True)
class LossResult:
    """What was found for a loss.

    Attributes:
        decision: the likelihood, as ``repr`` shows it.
        reason: what it was found from.
        doubt: the warning that there was, or empty.
        direction: largest difference of Γ from that of the loss's own gradients, both at trace one.
        scale: trace of Γ relative to that of the log-likelihood's gradients; None where the loss is
            none.
    """

    decision: str
    reason: str
    doubt: str
    direction: float
    scale: float | None


class SmallNet(nn.Module):
    """Two linear layers in double precision, the output of the second in a given form."""

    def __init__(self, case: LossCase) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.form = case.shape, case.output
        self.hidden = nn.Linear(6, 12)
        self.last = nn.Linear(12, prod(case.shape[1:]))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6]`` to the output."""
        own: Tensor = self.form(self.last(torch.tanh(self.hidden(x))).reshape(self.shape))
        return own


def check_loss(case: LossCase) -> LossResult:
    """Γ of the last layer in a step of "eigen" by the loss's own gradients."""
    net = SmallNet(case)
    x = 2 * torch.randn(case.shape[0], 6, dtype=torch.float64, generator=_generator())
    expected = _gamma(net, case, x)
    own = _gamma_of_loss(net, case, x)
    kfc_fx.compile(net)
    statistics = kfc_fx.Statistics(fisher="empirical", samples=None)
    opt = kfc_fx.KFC(net, lr=0.0, scaling="eigen", statistics=statistics)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.loss(net(x)).backward()
    opt.step()
    found = opt.factors["last"].gamma
    compilation = kfc_fx.Compilation.of(net)
    (line,) = compilation.plan.likelihood
    return LossResult(
        repr(compilation.likelihood),
        line.split(": ", 1)[1],
        "; ".join(str(warning.message) for warning in caught),
        float((found / found.trace() - own / own.trace()).abs().max()),
        None if expected is None else float(found.trace() / expected.trace()),
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _gamma_of_loss(net: SmallNet, case: LossCase, x: Tensor) -> Tensor:
    """Γ of the loss's own gradients, at its own scale."""
    h = net.last(torch.tanh(net.hidden(x))).detach().requires_grad_()
    (rows,) = torch.autograd.grad(case.loss(case.output(h.reshape(case.shape))), h)
    return rows.mT @ rows


def _gamma(net: SmallNet, case: LossCase, x: Tensor) -> Tensor | None:
    """Γ of the gradients of each example's log-likelihood, the mean over the examples that count.

    Weights w keep their proportions, at the scale that fits the gradients best:
    ``w Σ w |g|² / Σ w² |g|²``.
    """
    if case.examples is None:
        return None
    h = net.last(torch.tanh(net.hidden(x))).detach().requires_grad_()
    (rows,) = torch.autograd.grad(case.examples(case.output(h.reshape(case.shape))).sum(), h)
    count = float(len(rows))
    if case.weights is not None:
        rows = rows * (case.weights > 0)[:, None]
        squares, w = rows.square().sum(1), case.weights
        rows = rows * (w * (w * squares).sum() / (w.square() * squares).sum())[:, None]
        count = float((case.weights > 0).sum())
    return rows.mT @ rows / count
