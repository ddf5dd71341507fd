"""A compiled model behaves as the original, on plain steps and on steps with statistics."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import kfc_fx
from tests.models import (
    IMAGES,
    assert_equal_state,
    backward,
    collector_of,
    count_calls_of_emitting_graphs,
    make,
    parameters,
    token_network,
    train,
)

BLOCKS = {"conv", "norm", "grouped", "tokens", "head"}


@pytest.mark.parametrize("armed", [False, True])
def test_outputs_gradients_buffers_and_rng_are_bit_equal(armed, monkeypatch):
    emitted = count_calls_of_emitting_graphs(monkeypatch)
    net, reference = token_network(), token_network()
    compiled, _opt = make(net)
    collector_of(compiled).arm(armed)
    for _ in range(2):
        assert torch.equal(backward(compiled), backward(reference))
        after_compiled = backward(compiled), torch.get_rng_state()
        after_reference = backward(reference), torch.get_rng_state()
        assert all(map(torch.equal, after_compiled, after_reference))
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert_equal_state(net, reference)
    assert bool(collector_of(compiled).sums.blocks) == armed
    assert len(emitted) == 4 * armed


@pytest.mark.parametrize("armed", [False, True])
def test_dropout_draws_what_the_original_draws(armed):
    compiled, _ = make(token_network())
    reference = token_network()
    collector_of(compiled).arm(armed)
    torch.manual_seed(5)
    found = [compiled(IMAGES) for _ in range(3)]
    torch.manual_seed(5)
    expected = [reference(IMAGES) for _ in range(3)]
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], found[1])


class NumpyMask(nn.Module):
    """Masks tokens that it draws from numpy, as augmentation of speech does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        kept = np.random.rand(*x.shape) > 0.5
        return self.linear(x * torch.from_numpy(kept))


@pytest.mark.parametrize("armed", [False, True])
def test_numpys_random_numbers_are_those_of_the_original(armed):
    compiled, _ = make(NumpyMask())
    collector_of(compiled).arm(armed)
    x = torch.randn(6, 4)
    np.random.seed(5)
    found = [compiled(x) for _ in range(2)]
    np.random.seed(5)
    expected = [compiled._call_impl(x) for _ in range(2)]
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], found[1])


def shifted(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
        for buffer in net.buffers():
            buffer.add_(1)
    return net


def test_state_dict_loads_from_uncompiled_to_compiled_and_back():
    source = shifted(token_network())
    compiled = kfc_fx.compile(token_network())
    compiled.load_state_dict(source.state_dict())
    assert_equal_state(compiled, source)
    plain = token_network()
    plain.load_state_dict(compiled.state_dict())
    assert_equal_state(plain, source)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        compiled.load_state_dict({k: v for k, v in source.state_dict().items() if k != "head.bias"})


def test_state_dict_loads_where_the_compiled_model_is_a_child():
    source = nn.ModuleDict({"body": shifted(token_network()), "tail": nn.Linear(5, 2)})
    parent = nn.ModuleDict({"body": kfc_fx.compile(token_network()), "tail": nn.Linear(5, 2)})
    parent.load_state_dict(source.state_dict())
    assert_equal_state(parent, source)
    plain = nn.ModuleDict({"body": token_network(), "tail": nn.Linear(5, 2)})
    plain.load_state_dict(parent.state_dict())
    assert_equal_state(plain, source)


class WithExtraState(nn.Linear):
    loaded = None

    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        self.loaded = state


def test_extra_state_loads_where_the_compiled_model_is_a_child():
    parent = nn.Sequential(kfc_fx.compile(WithExtraState(4, 3)))
    assert list(parent.state_dict()) == ["0.weight", "0.bias", "0._extra_state"]
    parent.load_state_dict(parent.state_dict())
    assert parent[0].loaded is not None


def test_loading_in_place_in_the_middle_of_training_is_seen():
    compiled, opt = make(token_network())
    reference = token_network()
    backward(compiled)
    opt.step()
    opt.zero_grad()
    state = {k: v + 1 if v.is_floating_point() else v for k, v in reference.state_dict().items()}
    compiled.load_state_dict(state)
    reference.load_state_dict(state)
    assert torch.equal(backward(compiled), backward(reference))
    assert torch.equal(compiled.conv.weight.grad, reference.conv.weight.grad)
    assert len(compiled.kfc.graphs) == 1


def test_modes_and_no_grad_are_the_originals():
    net = token_network()
    compiled = kfc_fx.compile(net)
    assert compiled.eval() is compiled
    assert not net.training
    assert not net.norm.training
    with torch.no_grad():
        output = compiled(IMAGES)
    assert not output.requires_grad
    assert torch.equal(output, net._call_impl(IMAGES))
    with torch.inference_mode():
        assert torch.equal(compiled(IMAGES), output)
    assert compiled.train() is compiled
    assert net.training
    assert net.norm.training
    assert compiled.training
    parent = nn.Sequential(compiled)
    parent.eval()
    assert not net.norm.training


@pytest.mark.parametrize("armed", [False, True])
def test_eval_mode_with_gradients_is_the_originals(armed):
    compiled, _ = make(token_network().eval())
    reference = token_network().eval()
    collector_of(compiled).arm(armed)
    assert torch.equal(backward(compiled), backward(reference))
    compiled.train()
    reference.train()
    assert torch.equal(backward(compiled), backward(reference))
    assert_equal_state(compiled, reference)


def test_evaluation_without_gradients_collects_nothing(monkeypatch):
    emitted = count_calls_of_emitting_graphs(monkeypatch)
    compiled, opt = make(token_network())
    with torch.no_grad():
        compiled(IMAGES)
    assert not emitted
    backward(compiled)
    with torch.no_grad():
        compiled(IMAGES)
    assert len(emitted) == 1
    assert collector_of(compiled).sums.examples == len(IMAGES)
    opt.step()


def test_dtype_moves_with_the_model():
    compiled, opt = make(token_network())
    backward(compiled)
    opt.step()
    opt.zero_grad()
    assert compiled.to(torch.float64) is compiled
    assert compiled.norm.running_mean.dtype == torch.float64
    output = backward(compiled, IMAGES.double())
    assert output.dtype == torch.float64
    opt.step()
    assert opt.factors["conv"].omega.dtype == torch.float64


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_independent_and_train(duplicate):
    compiled, opt = make(token_network())
    backward(compiled)
    copied = duplicate(compiled)
    assert_equal_state(copied, compiled)
    before = parameters(compiled)
    copied.zero_grad()
    again = kfc_fx.KFC(copied, lr=0.01, seed=3)
    backward(copied)
    again.step()
    assert all(map(torch.equal, compiled.parameters(), before))
    assert copied.kfc.model is copied
    assert not torch.equal(copied.conv.weight, compiled.conv.weight)
    opt.step()  # the copy's optimizer did not take the original's place
    assert set(opt.factors) == set(again.factors) == BLOCKS


@pytest.mark.parametrize("steps", [0, 1])
def test_an_error_of_the_model_is_the_models_own_and_training_goes_on(steps):
    compiled, opt = make()
    train(compiled, opt, steps)
    with pytest.raises(RuntimeError, match="channels") as raised:
        compiled(torch.randn(4, 3, 6, 6))
    assert raised.type is RuntimeError  # and none of dynamo's
    train(compiled, opt, 2)
    assert not compiled.kfc.plan.breaks
    assert {graph.layer for graph in compiled.kfc.plan.graphs} == {""}
