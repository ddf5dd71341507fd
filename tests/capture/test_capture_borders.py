"""Where the capture meets what stands around it: other calls, other passes, transforms, hooks on
saved tensors, backends that fail."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfc_fx
from tests.capture.broken_programs import batches, factors_are_true
from tests.capture.test_broken_programs import (
    WIDTH,
    Disabled,
    Net,
    Printing,
    Reentrant,
    Whole,
    build,
)
from tests.models import collector_of, make_always_due

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

(X, Y), (X2, Y2), *_ = batches((6, 4))


def make(net: nn.Module, **options):
    return make_always_due(net.double(), **{"lr": 0.0, **options})


def blocks_of(compiled) -> set[str]:
    return {block.name for block in compiled.kfc.plan.blocks}


# -- several passes ------------------------------------------------------------------------


def test_backward_passes_of_several_forward_passes_leave_nothing_behind():
    compiled, opt = make(build(Reentrant), fisher="empirical", samples=None)
    inside = compiled.kfc
    settings = {n: getattr(torch._dynamo.config, n) for n in ("suppress_errors", "allow_rnn")}
    (F.cross_entropy(compiled(X), Y) + F.cross_entropy(compiled(X2), Y2)).backward()
    assert not inside._passes
    assert inside._call is None
    assert not inside._layers.watch.recording
    assert {n: getattr(torch._dynamo.config, n) for n in settings} == settings
    below = [module for module in compiled.modules() if module is not compiled]
    assert all("_compiled_call_impl" not in vars(module) for module in below)
    statistics = collector_of(compiled).sums
    assert statistics.examples == 10
    assert statistics.rows["blocks.0.first"] == [10]
    opt.step()
    assert len(opt.factors) == 8


class Recurrent(Net):
    """The output goes into the next call."""

    def forward(self, x):
        return super().forward(torch.cat([x[:, :1], x[:, 1:4]], 1))


def test_what_an_earlier_call_used_is_no_use_outside():
    compiled, opt = make(build(Recurrent))
    hidden = compiled(X)
    output = compiled(torch.cat([X[:, :1], hidden], 1))
    F.cross_entropy(output, Y).backward()
    opt.step()
    assert compiled.kfc.plan.generic == ()
    assert len(blocks_of(compiled)) == 8


def test_a_call_of_the_model_within_its_call_is_no_use_outside():
    net = build(Net)
    compiled, opt = make(net)
    called = []

    @torch._dynamo.disable
    def again(module, args, output):
        if not called:
            called.append(True)
            return output + compiled(args[0])
        return None

    net.register_forward_hook(again)
    F.cross_entropy(compiled(X), Y).backward()
    opt.step()
    assert compiled.kfc.plan.generic == ()


def test_a_penalty_on_all_parameters_does_not_make_those_generic_that_are_used_later():
    class Growing(Net):
        block, depth = Whole, 1

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks[: self.depth]:
                x = block(x)
            return self.head(x)

    net = build(Growing)
    compiled, opt = make(net, fisher="empirical")
    for depth in (1, 1, 2, 3, 3):
        net.depth = depth
        penalty = sum(p.square().sum() for p in net.parameters())
        (F.cross_entropy(compiled(X), Y) + 1e-3 * penalty).backward()
        opt.step()
        opt.zero_grad()
        unused = {g.name for g in compiled.kfc.plan.generic if "blocks" in g.name}
        assert len(unused) == 4 * (3 - depth)
        assert all("plain Python" in g.reason for g in compiled.kfc.plan.generic)
    assert len(blocks_of(compiled)) == 8


def test_the_last_pass_is_not_kept():
    import gc
    import weakref

    compiled, opt = make(build(Net))
    compiled.kfc.trace(X)
    kept = []
    collector = collector_of(compiled)
    own = collector.setup
    collector.setup = lambda record: kept.append(weakref.ref(record)) or own(record)
    F.cross_entropy(compiled(X), Y).backward()
    opt.step()
    gc.collect()
    assert [ref() for ref in kept] == [None]


# -- transforms and hooks ------------------------------------------------------------------


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x)
        rows = torch.vmap(lambda row: F.linear(row, self.first.weight))(h)
        return self.second(rows)


def test_a_use_inside_of_a_transform_makes_a_layer_generic_with_that_reason():
    compiled, opt = make(Mapped())
    F.cross_entropy(compiled(X), Y).backward()
    opt.step()
    assert blocks_of(compiled) == {"second"}
    reasons = {generic.name: generic.reason for generic in compiled.kfc.plan.generic}
    assert "vmap" in reasons["first.weight"]


class Offloaded(nn.Module):
    """Hooks on saved tensors around a reentrant checkpoint, and within one."""

    def __init__(self, reentrant: bool, inside: bool) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(4, WIDTH), Printing()
        self.head, self.reentrant, self.inside = nn.Linear(WIDTH, 3), reentrant, inside

    def body(self, x):
        if self.inside:
            with torch.autograd.graph.save_on_cpu():
                return self.block(x)
        return self.block(x)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(1):
            print(end="")
            x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_hooks_on_saved_tensors_around_and_within_checkpoints(reentrant, inside, around):
    torch.manual_seed(0)
    net = Offloaded(reentrant, inside).double()
    if not around:
        compiled = factors_are_true(net, batches(), "empirical")
        assert len(blocks_of(compiled)) == 4
        return
    with torch.autograd.graph.save_on_cpu():
        compiled = factors_are_true(net, batches(), "empirical")
    assert len(blocks_of(compiled)) == 4


class AllInside(Net):
    """Every layer, or all but the head, in a reentrant checkpoint."""

    block, outside = Whole, False

    def body(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x if self.outside else self.head(x)

    def forward(self, x):
        x = x.clone().requires_grad_()
        for _ in range(1):
            print(end="")
            x = checkpoint(self.body, x, use_reentrant=True)
        return self.head(x) if self.outside else x


class AllButTheHead(AllInside):
    outside = True


@pytest.mark.parametrize("kind", [AllInside, AllButTheHead])
def test_layers_within_reentrant_checkpoints_alone(kind):
    compiled = factors_are_true(build(kind), batches(), "empirical")
    assert len(blocks_of(compiled)) == 8
    compiled, opt = make(build(kind), fisher="sampled")
    F.cross_entropy(compiled(X), Y).backward()
    with pytest.raises(kfc_fx.KfcError, match="use_reentrant=False"):
        opt.step()


def test_a_micro_batch_without_statistics_is_said_and_not_counted():
    class Sometimes(Net):
        again = False

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                print(end="")
                x = checkpoint(block, x, use_reentrant=True) if self.again else block(x)
            return self.head(x)

    net = build(Sometimes)
    compiled, opt = make(net, fisher="sampled")
    F.cross_entropy(compiled(X), Y).backward()
    opt.step()
    opt.zero_grad()
    F.cross_entropy(compiled(X), Y).backward()
    net.again = True
    F.cross_entropy(compiled(X2), Y2).backward()
    assert collector_of(compiled).sums.examples == len(X)
    with pytest.warns(kfc_fx.KfcWarning, match="use_reentrant=False"):
        opt.step()
    assert opt.diagnostics.statistics_steps == 2
    assert opt.diagnostics.missed_statistics == 1


def test_a_capture_that_fails_in_the_backward_pass_raises(monkeypatch):
    from kfc_fx.compilation import bindings

    compiled, _ = make(build(AllInside), fisher="empirical")
    output = compiled(X)

    def fail(*_: object, **__: object) -> None:
        raise kfc_fx.KfcError("a fault of ours")

    monkeypatch.setattr(bindings, "match_uses", fail)
    with pytest.raises(kfc_fx.KfcError, match="a fault of ours"):
        F.cross_entropy(output, Y).backward()


class NestedCheckpoints(Net):
    """A reentrant checkpoint around another."""

    block = Printing

    def body(self, block, x):
        return checkpoint(block, x, use_reentrant=False)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            print(end="")
            x = checkpoint(self.body, block, x, use_reentrant=True)
        return self.head(x)


def test_a_checkpoint_within_a_reentrant_one():
    compiled = factors_are_true(build(NestedCheckpoints), batches(), "empirical")
    assert len(blocks_of(compiled)) == 8


class GradientsWithin(Net):
    """A backward pass within the forward pass, in a frame that is skipped."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(block(z).sum(), z)
            x = block(x) + 0.1 * gradient
        return self.head(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_backward_pass_within_the_forward_pass(backend):
    net = build(GradientsWithin)
    expected = net(X)
    compiled = kfc_fx.compile(net, backend=backend)
    opt = kfc_fx.KFC(compiled, lr=0.0)
    output = compiled(X)
    F.cross_entropy(output, Y).backward()
    opt.step()
    torch.testing.assert_close(output, expected)
    assert len(blocks_of(compiled)) == 8


@pytest.mark.parametrize("kind", [Net, Whole])
def test_hooks_may_come_and_go(kind):
    net = build(kind) if kind is Net else build(Net)
    if kind is Whole:
        net.blocks = nn.ModuleList(Whole().double() for _ in range(3))
    compiled, opt = make(net)
    seen = []
    for number in range(5):
        if number == 1:
            first = net.blocks[0].second.register_forward_hook(lambda m, a, y: 2 * y)
            second = net.stem.register_forward_hook(lambda m, a, y: seen.append(1))
        if number == 3:
            first.remove()
            second.remove()
        expected = net._call_impl(X)
        output = compiled(X)
        assert torch.equal(output, expected)
        F.cross_entropy(output, Y).backward()
        opt.step()
    assert len(seen) == 4
    assert opt.diagnostics.missed_statistics == 0


# -- numbers, backends, frames that are shared ---------------------------------------------


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

    from kfc_fx.compilation import compilation

    def fail(*_: object) -> None:
        raise BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)

    compiled = kfc_fx.compile(nn.Sequential(nn.Linear(4, 3)).double(), backend="inductor")
    monkeypatch.setattr(compilation, "compile_plain", fail)
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
