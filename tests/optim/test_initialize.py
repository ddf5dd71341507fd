"""The first factors, before any step."""

from __future__ import annotations

import copy

import pytest
import torch

import kfc_fx
from tests.models import (
    IMAGES,
    LABELS,
    assert_equal,
    backward,
    conv_network,
    make,
    train,
)

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


def fixed_cotangents(z: torch.Tensor) -> torch.Tensor:
    return z.softmax(1) - 0.2


@pytest.mark.parametrize(
    "batches",
    [
        [IMAGES],
        [(IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])],
        [{"input": IMAGES[:3]}, [IMAGES[3:], LABELS[3:]]],
        iter([(IMAGES, LABELS)]),
    ],
    ids=["tensor", "pairs", "mixed", "iterator"],
)
def test_initialize_gives_the_factors_of_all_its_batches_and_nothing_else(batches):
    net = conv_network().eval()
    reference = kfc_fx.compile(conv_network().eval(), likelihood=fixed_cotangents)
    plain = kfc_fx.KFC(reference, lr=0.0)
    backward(reference)
    plain.step()
    compiled = kfc_fx.compile(net, likelihood=fixed_cotangents)
    opt = kfc_fx.KFC(compiled, lr=0.01)
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    opt.initialize(batches)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_equal(net.state_dict().values(), before.values())
    assert all(p.grad is None for p in net.parameters())
    for name, expected in plain.factors.items():
        torch.testing.assert_close(opt.factors[name].omega, expected.omega, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(opt.factors[name].gamma, expected.gamma, rtol=1e-4, atol=1e-8)
    assert opt.diagnostics.steps == 0
    train(compiled, opt, 2)


def test_initialize_leaves_batch_statistics_of_a_training_model_alone():
    compiled = kfc_fx.compile(conv_network(), likelihood="categorical")
    opt = kfc_fx.KFC(compiled)
    before = copy.deepcopy(compiled.state_dict())
    opt.initialize([IMAGES])
    assert_equal(compiled.state_dict().values(), before.values())


def test_initialize_before_any_loss_needs_the_name_of_the_likelihood():
    compiled, opt = make()
    with pytest.raises(kfc_fx.OptionError, match=r"name it, as in kfc_fx.compile\(model, likeli"):
        opt.initialize([IMAGES])
    train(compiled, opt, 1)
    opt.initialize([IMAGES])  # known by now


@pytest.mark.parametrize("empty", [[], iter(())], ids=["list", "iterator"])
def test_initialize_without_a_batch_is_an_error(empty):
    _, opt = make()
    with pytest.raises(kfc_fx.StatisticsError, match="initialize got no batch"):
        opt.initialize(empty)
