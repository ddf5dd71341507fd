"""Where the capture meets what stands around it: other calls, other passes, transforms, hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfc_fx
from kfc_fx.capture.entries import is_entry_call
from tests.capture.broken_programs import batches, factors_are_true
from tests.capture.test_broken_programs import (
    WIDTH,
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
    inside = compiled.kfc._runs
    settings = {n: getattr(torch._dynamo.config, n) for n in ("suppress_errors", "allow_rnn")}
    (F.cross_entropy(compiled(X), Y) + F.cross_entropy(compiled(X2), Y2)).backward()
    assert not inside._passes
    assert inside._call is None
    assert not inside.layers.watch.recording
    assert {n: getattr(torch._dynamo.config, n) for n in settings} == settings
    below = [module for module in compiled.modules() if module is not compiled]
    assert all(is_entry_call(vars(module)["_compiled_call_impl"]) for module in below)
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


def test_a_layer_whose_hook_has_raised_is_captured_when_plain_python_calls_it():
    """Which a full backward hook makes it do."""
    torch.manual_seed(0)
    compiled, opt = make(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))

    def fail(*_):
        raise ZeroDivisionError

    hook = compiled[0].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        compiled(X)
    hook.remove()
    compiled[0].register_full_backward_hook(lambda *_: None)
    F.cross_entropy(compiled(X.clone().requires_grad_()), Y).backward()
    opt.step()
    assert blocks_of(compiled) == {"0", "2"}
    assert opt.factors["0"].gamma.any()
