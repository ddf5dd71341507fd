"""``maximize=True`` equals minimizing the negated loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kfc_fx
from tests.models import IMAGES, LABELS, assert_equal, conv_network, parameters
from tests.options import kfc


def run(sign, steps=3, likelihood="categorical", norm_layers=True, **options):
    compiled = kfc_fx.compile(conv_network(), likelihood=likelihood, norm_layers=norm_layers)
    opt = kfc(compiled, lr=0.02, seed=3, maximize=sign < 0, **options)

    def closure():
        opt.zero_grad()
        output = compiled(IMAGES)
        if likelihood == "bernoulli":
            loss = F.binary_cross_entropy_with_logits(output, F.one_hot(LABELS, 5).float())
        else:
            loss = F.cross_entropy(output, LABELS)
        (sign * loss).backward()
        return sign * loss

    for _ in range(steps):
        opt.step(closure)
    return compiled, opt


@pytest.mark.parametrize(
    ("likelihood", "fisher"),
    [("categorical", "empirical"), ("categorical", "sampled"), ("bernoulli", "empirical")],
)
@pytest.mark.parametrize(
    "options",
    [
        {"scaling": "adam", "weight_decay": 0.1, "average": 3.0, "norm_layers": False},
        {"scaling": "spectral"},
        {"scaling": "eigen"},
        {"scaling": "inverse", "quadratic_model": True, "adapt_damping": 1},
    ],
    ids=lambda options: options["scaling"],
)
def test_it_equals_minimizing_the_negated_loss(options, fisher, likelihood):
    down, minimized = run(1, likelihood=likelihood, fisher=fisher, **options)
    up, maximized = run(-1, likelihood=likelihood, fisher=fisher, **options)
    assert_equal(parameters(up), parameters(down))
    for name, factors in minimized.factors.items():
        if options["scaling"] != "spectral":
            assert torch.equal(factors.gamma, maximized.factors[name].gamma)
    assert maximized.diagnostics.damping == minimized.diagnostics.damping
    assert maximized.diagnostics.reduction_ratio == minimized.diagnostics.reduction_ratio


def test_gradients_stay_as_they_are():
    compiled, _ = run(-1, steps=1)
    reference, _ = run(1, steps=1)
    for mine, theirs in zip(compiled.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad, -theirs.grad)
