"""One frame for many modules: numbers that differ, recompile limits, backends, frames of ours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.capture.broken_programs import batches, factors_are_true
from tests.capture.test_broken_programs import (
    WIDTH,
    Disabled,
    Net,
    build,
)
from tests.capture.test_capture_borders import X, Y, blocks_of, make

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Numbered(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.weight, self.dilation = nn.Parameter(torch.randn(4, 4, 3)), dilation

    def forward(self, x):
        print(end="")
        return F.conv1d(x, self.weight, None, 1, 2 * self.dilation // 2, self.dilation)


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(1, 9)
        self.first, self.second, self.third = Numbered(1), Numbered(2), Numbered(3)
        self.fourth, self.head = Numbered(2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x[..., None]).tanh()
        x = self.second(self.first(x).tanh()).tanh()
        return self.head(self.fourth(self.third(x).tanh()).mean(2))


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_one_graph_serves_modules_that_differ_in_a_number(fisher):
    net = build(Numbers)
    layers = {
        name: nn.Conv1d(4, 4, 3, padding=d, dilation=d, bias=False).double()
        for name, d in (("first", 1), ("second", 2), ("third", 3), ("fourth", 2))
    }
    plain = copy.deepcopy(net)
    for name, layer in layers.items():
        layer.weight = getattr(plain, name).weight
        setattr(plain, name, layer)
    options = {"fisher": fisher, "samples": None, "seed": 3, "input_factor": "dense"}
    found = []
    for own in (net, plain):
        compiled, opt = make(own, **options)
        F.cross_entropy(compiled(X), Y).backward()
        opt.step()
        found.append((compiled, opt.factors))
    numbers = [{key[2] for key in graph.bindings} for graph in found[0][0].kfc.graphs]
    assert {(2,), (3,)} <= max(numbers, key=len)
    for name in (*layers, "stem", "head"):
        own, expected = found[0][1][name], found[1][1][name]
        torch.testing.assert_close(own.omega, expected.omega)
        torch.testing.assert_close(own.gamma, expected.gamma)


def test_sizes_of_the_batch_that_a_call_without_parameters_takes_cost_no_graph():
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.first(x).tanh()
            kernel = torch.ones(len(x), 1, 1, dtype=x.dtype)
            return self.second(F.conv1d(h[None], kernel, groups=len(x))[0])

    compiled, opt = make(Batched())
    for size in range(3, 15):
        F.cross_entropy(compiled(torch.randn(size, 4).double()), torch.arange(size) % 3).backward()
        opt.step()
        opt.zero_grad()
    assert len(compiled.kfc.graphs) <= 2
    assert not compiled.kfc.plan.breaks


def test_a_backend_that_cannot_compile_raises(monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    from kfc_fx.compilation import runs

    def fail(*_: object) -> None:
        raise BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)

    compiled = kfc_fx.compile(nn.Sequential(nn.Linear(4, 3)).double(), backend="inductor")
    monkeypatch.setattr(runs, "compile_plain", fail)
    with pytest.raises(BackendCompilerFailed, match=r"no C\+\+ compiler"):
        compiled(X)


class Owning(nn.Module):
    """A parameter of its own, and a break."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = x * self.scale
        print(end="")
        return self.layer(h).tanh()


class Many(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Owning() for _ in range(14))


def test_many_modules_with_parameters_of_their_own_share_their_frames():
    compiled = factors_are_true(build(Many), batches(), "empirical")
    assert {f"blocks.{n}.layer" for n in range(14)} <= blocks_of(compiled)
    assert not any("limit" in found.reason for found in compiled.kfc.plan.breaks)


def test_what_the_user_compiled_runs_on_ordinary_steps():
    net, calls = build(Disabled), []

    def backend(module, example_inputs):
        return lambda *inputs: calls.append(True) or module.forward(*inputs)

    net.stem.compile(backend=backend)
    own = net.stem._compiled_call_impl
    net(X)
    runs = bool(calls)  # torch 2.11 leaves it out in a function with torch._dynamo.disable
    calls.clear()
    compiled, opt = make(net, every=20, refresh_every=20)
    for _ in range(12):
        F.cross_entropy(compiled(X), Y).backward()
        opt.step()
        opt.zero_grad()
    assert bool(calls) == runs
    assert net.stem._compiled_call_impl is own
    assert "stem" in blocks_of(compiled)


def test_the_exact_fisher_matrix_is_refused_beside_complex_parameters():
    net = nn.Sequential(nn.Linear(4, 3))
    net.register_parameter("filter", nn.Parameter(torch.ones(3, dtype=torch.cdouble)))
    for options in ({"clip_by": "exact"}, {"quadratic_model": True}, {"adapt_damping": 5}):
        with pytest.raises(kfc_fx.OptionError, match="complex"):
            make(net, scaling="inverse", **options)


def test_no_frame_of_ours_is_among_the_breaks():
    class Aiming(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                print(end="")
                with torch.no_grad():
                    aim = self.head(block(x))
                x = block(x)
            return self.head(x) + aim

    compiled, opt = make(build(Aiming))
    F.cross_entropy(compiled(X), Y).backward()
    opt.step()
    assert len(blocks_of(compiled)) == 8
    assert compiled.kfc.plan.breaks
    ours = str(Path(kfc_fx.__file__).parent)
    assert not any(f"({ours}" in found.function for found in compiled.kfc.plan.breaks)


class Helping(nn.Module):
    """A function between the model and its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def help(self, x):
        print(end="")
        return F.linear(self.first(x).tanh(), self.weight)

    def forward(self, x):
        return self.second(self.help(x).tanh())


@pytest.mark.parametrize("kind", [Net, Helping])
@pytest.mark.parametrize("trained_before", [False, True])
def test_an_input_of_a_wrong_shape_raises_torchs_error_and_changes_nothing(kind, trained_before):
    compiled, opt = make(build(kind))

    def step() -> None:
        F.cross_entropy(compiled(X), Y).backward()
        opt.step()
        opt.zero_grad()

    if trained_before:
        step()
    for wrong in (torch.randn(5, 9).double(), torch.randn(5, 4)):
        with pytest.raises(RuntimeError, match=r"must match|cannot be multiplied|same dtype"):
            compiled(wrong)
    for _ in range(2):
        step()
    plain, _ = make(build(kind))
    plain.kfc.trace(X)
    assert blocks_of(compiled) == blocks_of(plain)
    assert compiled.kfc.plan.generic == ()
    assert all(
        "`print`" in found.reason for found in compiled.kfc.plan.breaks
    )  # and no fault of ours
    assert opt.diagnostics.missed_statistics == 0


class Calling(nn.Module):
    """A layer on each side of a function that breaks the graph, in a frame of its own."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


class Holding(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


def breaking():
    def function(x):
        print(end="")
        return x.tanh()

    return function


def test_models_of_one_class_do_not_use_up_each_other_s_frames():
    models = [build(lambda: Holding(Calling(breaking()))) for _ in range(10)]
    for model in models:
        compiled, opt = make(model)
        F.cross_entropy(compiled(X), Y).backward()
        opt.step()
        assert blocks_of(compiled) == {"inner.first", "inner.second"}
