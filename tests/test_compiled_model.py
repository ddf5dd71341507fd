"""A compiled model behaves as the original, on plain steps and on steps with statistics."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.networks import (
    IMAGES,
    LABELS,
    assert_equal_state,
    backward,
    collector_of,
    conv_network,
    count_calls_of_emitting_graphs,
    make,
    parameters,
    token_network,
)

BLOCKS = {"conv", "norm", "grouped", "tokens", "head"}


@pytest.mark.parametrize("armed", [False, True])
def test_outputs_gradients_buffers_and_rng_are_bit_equal(armed, monkeypatch):
    emitted = count_calls_of_emitting_graphs(monkeypatch)
    net, reference = token_network(), token_network()
    compiled, _ = make(net)
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
    expected = [compiled.original(x) for _ in range(2)]
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], found[1])


def test_parameters_are_the_same_objects_and_state_has_the_same_keys():
    net = token_network()
    compiled = kfc_fx.compile(net)
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in net.parameters()]
    assert list(compiled.state_dict()) == list(token_network().state_dict())
    assert dict(compiled.named_modules()).keys() == dict(net.named_modules()).keys()


def test_compiling_twice_starts_anew_from_the_original():
    net = token_network()
    once = kfc_fx.compile(net)
    twice = kfc_fx.compile(once, likelihood="gaussian")
    assert twice.original is net
    assert "gaussian" in repr(twice).lower()
    assert "not captured yet" in repr(once)
    once.trace(IMAGES)
    assert "1 graphs, 5 blocks" in repr(once)


def shifted(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
        for buffer in net.buffers():
            buffer.add_(1)
    return net


def test_state_dict_loads_from_original_to_compiled_and_back():
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


def test_apply_visits_the_original_itself():
    seen = []
    kfc_fx.compile(nn.Linear(4, 3)).apply(seen.append)
    assert [type(module) for module in seen] == [nn.Linear]


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
    assert len(compiled.graphs) == 1


def test_modes_and_no_grad_are_the_originals():
    net = token_network()
    compiled = kfc_fx.compile(net)
    assert compiled.eval() is compiled
    assert not net.training
    assert not net.norm.training
    with torch.no_grad():
        output = compiled(IMAGES)
    assert not output.requires_grad
    assert torch.equal(output, net(IMAGES))
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
    assert compiled.original.norm.running_mean.dtype == torch.float64
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
    assert not torch.equal(copied.conv.weight, compiled.conv.weight)
    opt.step()  # the copy's optimizer did not take the original's place
    assert set(opt.factors) == set(again.factors) == BLOCKS


def test_attributes_go_through_to_the_original():
    net = token_network()
    net.flag = 3
    compiled = kfc_fx.compile(net)
    assert compiled.flag == 3
    compiled.flag = 4
    assert net.flag == 4
    del compiled.flag
    assert not hasattr(net, "flag")
    assert compiled.conv is net.conv
    compiled.head = nn.Linear(6, 2)
    assert net.head.out_features == 2
    assert compiled(IMAGES).shape == (12, 2)
    compiled.register_buffer("extra", torch.zeros(1))
    assert net.extra is compiled.extra
    with pytest.raises(AttributeError, match="missing"):
        compiled.missing  # noqa: B018


def test_strict_refuses_a_layer_without_a_block():
    class Reparametrised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.layer(x) + self.layer.weight.sum())

    compiled = kfc_fx.compile(Reparametrised(), strict=True)
    with pytest.raises(kfc_fx.CoverageError, match=r"layer\.weight: also used by"):
        compiled.trace(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"likelihood": "poisson"}, "likelihood must be one of categorical.*'poisson'"),
        ({"likelihood": 3}, "likelihood must be one of categorical.*int"),
        ({"backend": "tensorrt"}, "backend must be one of eager, aot_eager, inductor.*'tensorrt'"),
    ],
)
def test_unknown_options_are_refused_with_the_known_ones(option, message):
    with pytest.raises(kfc_fx.OptionError, match=message):
        kfc_fx.compile(conv_network(), **option)


def test_only_modules_are_compiled():
    with pytest.raises(TypeError, match=r"takes an nn\.Module, got function"):
        kfc_fx.compile(lambda x: x)


def test_an_error_of_the_model_is_the_models_own_and_training_goes_on():
    compiled, opt = make()
    with pytest.raises(Exception, match="channels"):
        compiled(torch.randn(4, 3, 6, 6))
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    opt.step()


@pytest.mark.parametrize("mode", [True, False])
def test_compiling_leaves_the_mode_as_it_was(mode):
    model = conv_network().train(mode)
    compiled = kfc_fx.compile(model)
    assert compiled.training is mode
    assert all(module.training is mode for module in model.modules())
