"""Calls in the wrong order, unknown options, models that KFC cannot train: clear errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.networks import (
    IMAGES,
    LABELS,
    backward,
    conv_network,
    make,
    train,
)


def test_a_step_before_any_backward_is_an_error():
    compiled, opt = make()
    with pytest.raises(kfc_fx.StepError, match=r"call loss\.backward\(\) before opt\.step\(\)"):
        opt.step()
    train(compiled, opt, 1)
    with pytest.raises(kfc_fx.StepError, match=r"call loss\.backward\(\)"):
        opt.step()


def test_a_forward_pass_without_gradients_is_an_error_at_the_step():
    compiled, opt = make()
    with torch.no_grad():
        F.cross_entropy(compiled(IMAGES), LABELS)
    with pytest.raises(kfc_fx.StepError, match="output of the compiled model"):
        opt.step()


def test_a_forward_pass_through_the_original_before_any_capture_is_an_error():
    compiled, opt = make()
    backward(compiled.original)
    with pytest.raises(kfc_fx.KfcError, match=r"compiled\.trace|compiled model"):
        opt.step()


def test_an_optimizer_made_after_the_forward_pass_says_so():
    compiled = kfc_fx.compile(conv_network())
    backward(compiled)
    opt = kfc_fx.KFC(compiled, lr=0.1)
    with pytest.raises(kfc_fx.StatisticsError, match="after KFC was made"):
        opt.step()


def test_a_model_whose_layers_are_all_frozen_is_an_error_that_says_use_torch_optim():
    net = conv_network()
    for index in (0, 1, 3, 6):
        net[index].requires_grad_(False)
    net.append(nn.PReLU())
    compiled, opt = make(net)
    backward(compiled)
    with pytest.raises(kfc_fx.OptionError, match=r"nothing to precondition.*torch\.optim"):
        opt.step()


def test_a_sparse_gradient_is_refused_by_name():
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 5))
    compiled, opt = make(net)
    F.cross_entropy(compiled(LABELS), LABELS).backward()
    with pytest.raises(kfc_fx.StepError, match=r"gradient of 0\.weight is sparse"):
        opt.step()


def test_copying_the_optimizer_says_what_to_do_instead():
    _, opt = make(conv_network())
    with pytest.raises(kfc_fx.OptionError, match="load this one's state_dict"):
        copy.deepcopy(opt)


def test_a_step_before_any_backward_is_an_error_that_names_the_call():
    _, opt = make()
    with pytest.raises(kfc_fx.StepError, match=r"call loss\.backward\(\) before"):
        opt.step()


def test_a_forward_pass_around_the_compiled_model_is_an_error():
    compiled, opt = make()
    F.cross_entropy(compiled(IMAGES), LABELS)  # captured, but the loss comes from elsewhere
    F.cross_entropy(compiled.original(IMAGES), LABELS).backward()
    with pytest.raises(kfc_fx.StatisticsError, match="not the original"):
        opt.step()


def test_statistics_missed_later_are_counted_and_warned_of():
    compiled, opt = make(factor_interval=1)
    train(compiled, opt, 2)
    F.cross_entropy(compiled.original(IMAGES), LABELS).backward()
    with pytest.warns(kfc_fx.KfcWarning, match="due at step 2"):
        opt.step()
    assert opt.diagnostics.missed_statistics == 1


def test_a_model_with_nothing_to_precondition_is_an_error():
    compiled = kfc_fx.compile(nn.Sequential(nn.Flatten(), nn.PReLU(72)))
    opt = kfc_fx.KFC(compiled, lr=0.1)
    compiled(IMAGES).sum().backward()
    with pytest.raises(kfc_fx.OptionError, match="nothing to precondition"):
        opt.step()


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(kfc_fx.OptionError, match="the model has no parameters"):
        kfc_fx.KFC(kfc_fx.compile(nn.ReLU()))


def test_the_last_optimizer_made_owns_the_model():
    compiled, first = make()
    second = kfc_fx.KFC(compiled, lr=0.01)
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    with pytest.raises(kfc_fx.StepError, match="another KFC"):
        first.step()
    second.step()


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


def test_it_wants_a_compiled_model_and_its_own_parameters():
    with pytest.raises(kfc_fx.OptionError, match=r"pass kfc_fx\.compile\(model\)"):
        kfc_fx.KFC(conv_network(), lr=0.1)
    compiled = kfc_fx.compile(conv_network())
    with pytest.raises(kfc_fx.OptionError, match="not one of the compiled model"):
        kfc_fx.KFC(compiled, conv_network().parameters(), lr=0.1)
    with pytest.raises(TypeError):
        kfc_fx.KFC(compiled, lr=0.1, learning_rate=0.1)


def test_a_wrong_input_shape_raises_torchs_own_error_and_training_goes_on():
    compiled, opt = make()
    train(compiled, opt, 1)
    with pytest.raises(Exception, match="channels"):
        compiled(torch.randn(4, 3, 6, 6))
    train(compiled, opt, 2)
    assert not compiled.plan.breaks
    assert {graph.layer for graph in compiled.plan.graphs} == {""}
