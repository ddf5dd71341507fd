"""A compiled model behaves as the original, on plain steps and on steps with statistics."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import (
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
        compiled.kfc.trace(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"likelihood": "poisson"}, "likelihood must be one of auto, categorical.*'poisson'"),
        ({"likelihood": 3}, "likelihood must be one of auto, categorical.*int"),
        ({"backend": "tensorrt"}, "backend must be one of eager, aot_eager, inductor.*'tensorrt'"),
    ],
)
def test_unknown_options_are_refused_with_the_known_ones(option, message):
    with pytest.raises(kfc_fx.OptionError, match=message):
        kfc_fx.compile(conv_network(), **option)


def test_only_modules_are_compiled():
    with pytest.raises(TypeError, match=r"takes an nn\.Module, got function"):
        kfc_fx.compile(lambda x: x)


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


@pytest.mark.parametrize("mode", [True, False])
def test_compiling_leaves_the_mode_as_it_was(mode):
    model = conv_network().train(mode)
    compiled = kfc_fx.compile(model)
    assert compiled.training is mode
    assert all(module.training is mode for module in model.modules())


# -- in place ------------------------------------------------------------------------------


def test_the_model_stays_the_object_that_it_was():
    net = token_network()
    before, kind, attributes = net.forward, type(net), set(vars(net))
    assert kfc_fx.compile(net) is net
    assert type(net) is kind
    assert net.forward == before
    assert set(vars(net)) - attributes == {"_compiled_call_impl", "kfc"}
    assert list(net.state_dict()) == list(token_network().state_dict())
    assert [name for name, _ in net.named_modules()] == [
        name for name, _ in token_network().named_modules()
    ]
    assert inspect.signature(net.forward) == inspect.signature(token_network().forward)


def test_items_and_length_are_the_models_own():
    net = kfc_fx.compile(conv_network())
    assert len(net) == len(conv_network())
    assert isinstance(net[0], nn.Conv2d)
    assert isinstance(net, nn.Sequential)


def test_what_the_compiler_knows_is_behind_one_attribute():
    net = kfc_fx.compile(token_network(), likelihood="gaussian")
    assert isinstance(net.kfc, kfc_fx.Compilation)
    assert kfc_fx.Compilation.of(net) is net.kfc
    assert "not captured yet; likelihood='gaussian', backend='eager'" in repr(net.kfc)
    with pytest.raises(kfc_fx.CaptureError, match=r"model\.kfc\.trace"):
        net.kfc.plan  # noqa: B018
    net.kfc.trace(IMAGES)
    assert {block.name for block in net.kfc.plan.blocks} == BLOCKS
    assert "Compilation(TokenNet: 1 graph, 5 blocks; " in repr(net.kfc)
    assert len(net.kfc.graphs) == 1
    with pytest.raises(kfc_fx.OptionError, match="this Linear is not compiled"):
        kfc_fx.Compilation.of(nn.Linear(2, 2))


def test_compiling_twice_with_the_same_options_changes_nothing():
    net, opt = make(token_network())
    known = net.kfc
    assert kfc_fx.compile(net).kfc is known
    backward(net)
    opt.step()
    assert opt.diagnostics.statistics_steps == 1


def test_compiling_a_model_that_was_captured_to_look_at_makes_it_run():
    net = kfc_fx.compile(nn.Sequential(nn.Linear(4, 3)))
    net.kfc.trace_symbolic(torch.randn(2, 4))
    with pytest.raises(kfc_fx.CaptureError, match="Compile the model anew to train it"):
        net(torch.randn(2, 4))
    opt = kfc_fx.KFC(kfc_fx.compile(net))
    F.cross_entropy(net(torch.randn(2, 4)), torch.tensor([0, 1])).backward()
    opt.step()
    assert set(opt.factors) == {"0"}


def test_compiling_with_other_options_begins_anew():
    net, opt = make(token_network())
    backward(net)
    opt.step()
    known = net.kfc
    assert kfc_fx.compile(net, norm_layers=False).kfc is not known
    backward(net)
    with pytest.raises(kfc_fx.StepError, match=r"compiled anew, or uncompiled.*make a KFC for"):
        opt.step()
    assert "norm" not in {block.name for block in net.kfc.plan.blocks}


def test_uncompiled_models_are_as_they_were(monkeypatch):
    net, opt = make(token_network())
    backward(net)
    opt.step()
    opt.zero_grad()
    attributes = set(vars(token_network()))
    emitted = count_calls_of_emitting_graphs(monkeypatch)
    assert kfc_fx.uncompile(net) is net
    assert set(vars(net)) == attributes
    backward(net)
    assert not emitted
    with pytest.raises(kfc_fx.StepError, match="uncompiled"):
        opt.step()
    assert kfc_fx.uncompile(net) is net  # once more changes nothing


def test_models_that_torch_has_compiled_run_by_kfc_fx_until_uncompiled():
    net, runs = token_network(), []

    def backend(module, example_inputs):
        return lambda *inputs: runs.append(True) or module.forward(*inputs)

    net.compile(backend=backend)
    own = net._compiled_call_impl
    with pytest.warns(kfc_fx.KfcWarning, match=r"model\.compile\(\) was called before"):
        kfc_fx.compile(net)
    backward(net)
    assert not runs
    kfc_fx.uncompile(net)
    assert net._compiled_call_impl is own
    backward(net)
    assert runs


@pytest.mark.parametrize("around", ["model", "step", "parent", "method"])
def test_what_torch_compiles_past_kfc_fx_is_said_at_the_due_step(around):
    net, opt = make(token_network())
    parent = nn.Sequential(net)
    run = {
        "model": lambda: torch.compile(net, backend="eager"),
        "step": lambda: torch.compile(lambda x: net(x), backend="eager"),
        "parent": lambda: torch.compile(parent, backend="eager"),
        "method": lambda: net.compile(backend="eager") or net,
    }[around]()
    F.cross_entropy(run(IMAGES), LABELS).backward()
    with pytest.raises(kfc_fx.CaptureError, match=r"compile.*backend='inductor'"):
        opt.step()
    kfc_fx.compile(net)
    opt.zero_grad()
    backward(net)
    opt.step()
    opt.zero_grad()
    if around == "method":
        net.compile(backend="eager")
    F.cross_entropy(run(IMAGES), LABELS).backward()
    with pytest.warns(kfc_fx.KfcWarning, match=r"due at step 1 .*compile.*backend='inductor'"):
        opt.step()
    assert opt.diagnostics.missed_statistics == 1


def test_what_torch_compile_returned_is_refused():
    with pytest.raises(kfc_fx.OptionError, match=r"not what torch\.compile.*backend='inductor'"):
        kfc_fx.compile(torch.compile(token_network(), backend="eager"))


def test_an_attribute_of_the_models_own_is_left_alone():
    net = nn.ModuleDict({"kfc": nn.Linear(2, 2)})
    with pytest.raises(kfc_fx.OptionError, match="attribute 'kfc' of its own, of type Linear"):
        kfc_fx.compile(net)
    assert "_compiled_call_impl" not in vars(net)


def test_a_shallow_copy_is_not_compiled(monkeypatch):
    net, opt = make(token_network())
    shallow = copy.copy(net)
    emitted = count_calls_of_emitting_graphs(monkeypatch)
    backward(shallow)
    assert not emitted
    with pytest.raises(kfc_fx.OptionError, match="not compiled"):
        kfc_fx.Compilation.of(shallow)
    kfc_fx.compile(shallow)
    assert shallow.kfc is not net.kfc
    net.zero_grad()
    backward(net)
    opt.step()
    assert opt.diagnostics.statistics_steps == 1


def test_a_saved_model_needs_no_more_safe_globals_than_the_uncompiled_one(tmp_path):
    classes = [nn.Sequential, nn.Linear, nn.Tanh, set]
    net = kfc_fx.compile(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    torch.save(net, tmp_path / "model.pt")
    with torch.serialization.safe_globals(classes):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert loaded.kfc.model is loaded
    assert loaded.kfc.options == net.kfc.options
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    opt = kfc_fx.KFC(loaded)
    F.cross_entropy(loaded(x), y).backward()
    opt.step()
    assert len(opt.factors) == 2


class CallsItself(nn.Module):
    """A method of it calls the model, as ``training_step`` of trainers does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        return self.body(x)

    def loss(self, x, y):
        return F.cross_entropy(self(x), y)


@pytest.mark.parametrize("inside", [False, True])
def test_methods_that_call_the_model_train_it(inside):
    net = CallsItself()
    if inside:
        net.__init__()
        kfc_fx.compile(net)
    opt = kfc_fx.KFC(net)
    net.loss(torch.randn(5, 4), torch.randint(3, (5,))).backward()
    opt.step()
    assert set(opt.factors) == {"body"}


def test_dynamo_may_be_disabled():
    """Nothing calls itself without end, and the due step says what is missing."""
    code = (
        "import torch, kfc_fx\n"
        "net = kfc_fx.compile(torch.nn.Linear(3, 2))\n"
        "opt = kfc_fx.KFC(net)\n"
        "torch.nn.functional.cross_entropy(net(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1]))"
        ".backward()\n"
        "try: opt.step()\n"
        "except kfc_fx.CaptureError as error: print(error)\n"
    )
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "is it disabled, by TORCHDYNAMO_DISABLE=1?" in result.stdout


def test_hooks_on_the_model_run_as_uncompiled():
    net, reference = kfc_fx.compile(conv_network()), conv_network()
    seen = []
    for model in (net, reference):
        model.register_forward_pre_hook(lambda m, args: (2 * args[0],))
        model.register_forward_hook(lambda m, args, y: seen.append(len(y)) or y + 1)
    opt = kfc_fx.KFC(net, lr=0.0)
    for _ in range(3):
        assert torch.equal(net(IMAGES), reference(IMAGES))
    F.cross_entropy(net(IMAGES), LABELS).backward()
    opt.step()
    assert len(seen) == 7


def test_kfc_compiles_a_model_that_nobody_has():
    net = token_network()
    opt = kfc_fx.KFC(net, lr=0.01)
    assert net.kfc.options == kfc_fx.compile(token_network()).kfc.options
    backward(net)
    opt.step()
    assert set(opt.factors) == BLOCKS
