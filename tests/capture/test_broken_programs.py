"""Programs with breaks have the factors that hooks see on an uncompiled copy."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfc_fx
from kfc_fx.plan.coverage import NOT_USED
from tests.capture.broken_programs import batches, batches_for, broken_programs, factors_are_true
from tests.models import collector_of
from tests.options import kfc
from tests.test_properties import FIXED

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH = 5
FISHERS = pytest.mark.parametrize("fisher", ["empirical", "sampled"])
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


class Whole(nn.Module):
    """A block without a break."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


class Printing(Whole):
    def forward(self, x):
        h = self.first(x)
        print(end="")
        return x + self.second(F.relu(h))


class Branching(Whole):
    def forward(self, x):
        h = self.first(x)
        if h.sum().item() > 0:
            h = 2 * h
        return x + self.second(F.relu(h))


class Numpy(Whole):
    def forward(self, x):
        h = self.first(x)
        assert h.detach().numpy().sum() < 1e9
        return x + self.second(F.relu(h))


class Net(nn.Module):
    """The loop over the blocks; dynamo skips its frame where a block breaks in it."""

    block: type[nn.Module] = Printing

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class BranchingNet(Net):
    block = Branching


class NumpyNet(Net):
    block = Numpy


class Unrolled(Net):
    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        return self.head(self.blocks[2](self.blocks[1](x)))


class Hooked(Net):
    """Behind hooks that dynamo does not trace, on blocks and on layers."""

    block = Whole

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_hook(torch._dynamo.disable(lambda m, x, y: 1.5 * y))
        self.stem.register_forward_pre_hook(torch._dynamo.disable(lambda m, x: (x[0] + 1,)))


class Routing(Net):
    """To the first of some experts, by index."""

    block = Whole

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        share = self.gate(x).softmax(-1)
        top, out = share.argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.blocks):
            at = (top == number).nonzero()[:, 0]
            if len(at):
                out = out.index_add(0, at, expert(x[at]) * share[at, number : number + 1])
        return self.head(out)


class EarlyExit(Net):
    block = Whole

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            if x.abs().mean().item() > 0.5:
                break
        return self.head(x)


class Disabled(Net):
    def forward(self, x):
        off = torch._dynamo.disable(lambda layer, x: layer(x))
        x = off(self.stem, x)
        for block in self.blocks:
            x = off(block, x)
        return self.head(x)


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            print(end="")
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Reentrant(Checkpointed):
    reentrant = True


class Mixed(nn.Module):
    """Kinds of layers besides linear ones, with in-place activations, in a frame that is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.up, self.norm = nn.ConvTranspose1d(4, 4, 2), nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = (x > 0).long() + 2 * (x > 1).long()
        for _ in range(1):
            print(end="")
            h = self.table(tokens).mT
            h = F.relu(self.norm(self.up(F.relu(self.conv(h), inplace=True))), inplace=True).mT
            h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h.mean(1))


class Sized(nn.Module):
    """A layer of the user's whose numbers are attributes."""

    def __init__(self, kernel: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, kernel, stride, kernel // 2, groups=groups)
        self.norm = nn.GroupNorm(groups, 4)
        self.weight = nn.Parameter(torch.randn(4, 4 // groups, kernel))
        self.groups, self.reach = groups, kernel - 1

    def forward(self, x):
        x = self.norm(self.conv(x))
        print(end="")
        return F.relu(F.conv1d(x, self.weight, None, 1, self.reach // 2, 1, self.groups))


class Siblings(nn.Module):
    """Modules of one class that differ in numbers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 1, 1), (3, 2, 1), (1, 4, 1), (1, 2, 2)]
        self.blocks = nn.ModuleList(Sized(*size) for size in sizes)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.unsqueeze(1).expand(-1, 4, -1)
        x = self.blocks[1](self.blocks[0](x))
        x = self.blocks[3](self.blocks[2](x))
        return self.head(x.mean(2))


class WithoutGradients(Net):
    """A block runs under ``no_grad`` too, in a graph with what has gradients."""

    block = Whole

    def forward(self, x):
        x = self.stem(x)
        with torch.no_grad():
            aim = self.blocks[0](x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + aim)


PROGRAMS = [
    *(Net, BranchingNet, NumpyNet, Unrolled, Hooked, Routing, EarlyExit),
    *(Disabled, Checkpointed, Mixed, Siblings, WithoutGradients),
]


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


@BACKENDS
@FISHERS
@pytest.mark.parametrize("kind", PROGRAMS)
def test_factors_of_programs_with_breaks_are_true(kind, fisher, backend):
    with warnings.catch_warnings():
        if kind is NumpyNet:  # a graph that holds a call of numpy is run op by op, which is said
            warnings.simplefilter("ignore", kfc_fx.KfcWarning)
        compiled = factors_are_true(build(kind), batches(), fisher, backend)
    blocks = {block.name for block in compiled.kfc.plan.blocks}
    assert kind is not Mixed or {"attention.in_proj_weight", "attention.out_proj"} <= blocks
    without = {generic.name: generic.reason for generic in compiled.kfc.plan.generic}
    for name, module in compiled.named_modules():
        if type(module) is nn.Linear and f"{name}.weight" in without:
            assert kind is Routing
            assert without[f"{name}.weight"] == NOT_USED  # no example was sent to it


@FISHERS
def test_factors_are_true_with_inductor(fisher):
    factors_are_true(build(Net), batches(), fisher, "inductor")


def test_reentrant_checkpoints_have_the_statistics_of_the_losss_own_pass():
    compiled = factors_are_true(build(Reentrant), batches(), "empirical")
    assert len(compiled.kfc.plan.blocks) == 8


def test_reentrant_checkpoints_let_no_sampled_pass_through_and_that_is_said():
    compiled = kfc_fx.compile(build(Reentrant))
    opt = kfc(compiled, fisher="sampled")
    x, y = batches()[0]
    F.cross_entropy(compiled(x), y).backward()
    with pytest.raises(kfc_fx.StatisticsError, match="use_reentrant=False"):
        opt.step()


@settings(FIXED, max_examples=8)
@given(broken_programs())
def test_factors_of_drawn_programs_are_true(program):
    torch._dynamo.reset()
    for fisher in ("empirical", "sampled"):
        factors_are_true(program.build(), batches_for(program), fisher)


@pytest.mark.parametrize("kind", [Net, Routing, Checkpointed])
@pytest.mark.parametrize("scaling", ["adam", "spectral"])
def test_a_resumed_run_is_bit_equal(kind, scaling):
    def train(compiled, opt, steps):
        for step in steps:
            x, y = batches((6,) * 12)[step]
            F.cross_entropy(compiled(x), y).backward()
            opt.step()
            opt.zero_grad()

    def make(net):
        compiled = kfc_fx.compile(net)
        return compiled, kfc(compiled, lr=0.01, scaling=scaling, every=2)

    whole = make(build(kind))
    train(*whole, range(12))
    first = make(build(kind))
    train(*first, range(6))
    state = copy.deepcopy(first[1].state_dict())
    second = make(copy.deepcopy(first[0]))
    second[1].load_state_dict(state)
    train(*second, range(6, 12))
    for own, expected in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(own, expected)
    assert second[1].diagnostics.missed_statistics == 0


def test_nothing_is_left_on_the_model():
    net = build(Net)
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    factors_are_true(net, batches(), "empirical")
    kfc_fx.uncompile(net)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before


def test_a_forward_pass_that_fails_leaves_nothing_on_the_model():
    net = build(Net)
    compiled, x = kfc_fx.compile(net), batches()[0][0]
    compiled.kfc.trace(x)
    with pytest.raises(RuntimeError):
        compiled(torch.randn(3, 9, dtype=torch.float64))
    below = [module for module in net.modules() if module is not net]
    assert all("_compiled_call_impl" not in vars(module) for module in below)
    assert torch.equal(compiled(x), net._call_impl(x))


def test_tensors_that_are_no_parameters_now_give_no_statistics():
    compiled = kfc_fx.compile(build(Net))
    opt = kfc(compiled, lr=0.0, fisher="empirical")
    (x, y), *_ = batches()
    F.cross_entropy(compiled(x), y).backward()
    before = copy.deepcopy(collector_of(compiled).sums)
    for make in (lambda p: (1.1 * p).detach().requires_grad_(), nn.Parameter):
        fast = {name: make(p.detach() * 2) for name, p in compiled.named_parameters()}
        output = torch.func.functional_call(compiled, fast, (x,))
        F.cross_entropy(output, y).backward()
        assert all(p.grad is not None for p in fast.values())
    after = collector_of(compiled).sums
    assert after.rows == before.rows
    for block, sums in before.blocks.items():
        for name, value in sums.items():
            assert torch.equal(after.blocks[block][name], value)
    opt.step()
    assert len(opt.factors) == 8


def test_a_layer_that_was_replaced_has_its_name_at_the_next_step():
    net = build(Net)
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, lr=0.0, every=1, refresh_every=1)
    (x, y), *_ = batches()
    kept = net.head.weight
    for number in range(3):
        if number == 1:
            net.head = nn.Linear(WIDTH, 3).double()
        F.cross_entropy(compiled(x), y).backward()
        opt.step()
    assert kept is not net.head.weight
    assert compiled.kfc.plan.block("head").weight == "head.weight"
