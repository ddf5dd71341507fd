"""What KFC takes: models, parameters, options and their defaults."""

from __future__ import annotations

import pytest
from torch import nn

import kfc_fx
from tests.models import (
    IMAGES,
    backward,
    conv_network,
    make,
)

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


def test_it_wants_a_compiled_model_and_its_own_parameters():
    with pytest.raises(kfc_fx.OptionError, match=r"pass kfc_fx\.compile\(model\)"):
        kfc_fx.KFC(conv_network(), lr=0.1)
    compiled = kfc_fx.compile(conv_network())
    with pytest.raises(kfc_fx.OptionError, match="not one of the compiled model"):
        kfc_fx.KFC(compiled, conv_network().parameters(), lr=0.1)
    with pytest.raises(TypeError):
        kfc_fx.KFC(compiled, lr=0.1, learning_rate=0.1)


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(kfc_fx.OptionError, match="the model has no parameters"):
        kfc_fx.KFC(kfc_fx.compile(nn.ReLU()))


def test_a_model_whose_layers_are_all_frozen_is_an_error_that_says_use_torch_optim():
    net = conv_network()
    for index in (0, 1, 3, 6):
        net[index].requires_grad_(False)
    net.append(nn.PReLU())
    compiled, opt = make(net)
    backward(compiled)
    with pytest.raises(kfc_fx.OptionError, match=r"nothing to precondition.*torch\.optim"):
        opt.step()


def test_a_model_with_nothing_to_precondition_is_an_error():
    compiled = kfc_fx.compile(nn.Sequential(nn.Flatten(), nn.PReLU(72)))
    opt = kfc_fx.KFC(compiled, lr=0.1)
    compiled(IMAGES).sum().backward()
    with pytest.raises(kfc_fx.OptionError, match="nothing to precondition"):
        opt.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "shampoo"}, "scaling must be one of adam, spectral, eigen, inverse"),
        ({"fisher": "true"}, "fisher must be one of sampled, empirical"),
        ({"generic": "lion"}, "generic must be one of adamw, sgd"),
        ({"clip_by": "norm"}, "clip_by must be one of factors, exact"),
        ({"input_factor": "diagonal"}, "input_factor must be one of auto, dense, separable"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"ema_decay": -0.1}, "ema_decay must be in"),
        ({"factor_interval": 0}, "factor_interval must be a whole number"),
        ({"factor_samples": 0}, "factor_samples must be a whole number"),
        ({"factor_samples": 0.5}, "factor_samples must be a whole number"),
        ({"inverse_interval": 2.5}, "inverse_interval must be a whole number"),
        ({"damping": -1.0}, "damping must be positive"),
        ({"clip": 0.0}, "clip must be positive or None"),
        ({"average": -1.0}, "average must be positive or None"),
        ({"lr": -0.1}, "lr must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        (
            {"scaling": "inverse", "quadratic_model": True, "nesterov": True},
            "nesterov=True does not go with quadratic_model",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(kfc_fx.OptionError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("scaling", "lr"), [("adam", 0.01), ("spectral", 0.07), ("eigen", 0.03), ("inverse", 0.03)]
)
def test_the_learning_rate_has_a_default(scaling, lr):
    opt = kfc_fx.KFC(kfc_fx.compile(nn.Linear(3, 2)), scaling=scaling)
    assert opt.param_groups[0]["lr"] == lr
