"""``kfc_fx.compile`` and ``uncompile``: what is put on a model, refused, copied, and taken away."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import (
    IMAGES,
    LABELS,
    backward,
    conv_network,
    count_calls_of_emitting_graphs,
    make,
    token_network,
)

BLOCKS = {"conv", "norm", "grouped", "tokens", "head"}


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


@pytest.mark.parametrize("mode", [True, False])
def test_compiling_leaves_the_mode_as_it_was(mode):
    model = conv_network().train(mode)
    compiled = kfc_fx.compile(model)
    assert compiled.training is mode
    assert all(module.training is mode for module in model.modules())


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


def test_a_shallow_copy_is_not_compiled():
    net, opt = make(token_network())
    shallow = copy.copy(net)
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


class CompilesItself(CallsItself):
    def __init__(self) -> None:
        super().__init__()
        kfc_fx.compile(self)


@pytest.mark.parametrize("kind", [CallsItself, CompilesItself])
def test_methods_that_call_the_model_train_it(kind):
    net = kind()
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
