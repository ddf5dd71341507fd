"""Models with nothing to precondition."""

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
