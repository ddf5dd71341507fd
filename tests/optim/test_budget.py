"""The budget of the early phase: what is counted, who is due how often, and that it holds."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.codegen.spec import StackSpec
from kfc_fx.compilation.layer_work import layer_flops
from kfc_fx.engine.work import refresh_flops, stack_work
from kfc_fx.inspect.costs import gradient_work
from kfc_fx.inspect.inputs import InputSpec
from kfc_fx.inspect.inspection import InspectionOptions, inspect_model
from kfc_fx.inspect.update_costs import update_work
from kfc_fx.optim.budget import shared_out
from kfc_fx.optim.schedule import LEVELS, WINDOW, most_in_window
from tests.models import collector_of

BATCH = 8


def network() -> nn.Sequential:
    """Wide and narrow layers, whose refreshes cost many times their gradients."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 90), nn.Tanh()),
        *(nn.Linear(90, 90), nn.Tanh(), nn.Linear(90, 4)),
    )


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(BATCH, 6, generator=generator), torch.arange(BATCH) % 4) for _ in range(count)
    ]


def train(net: nn.Module, opt: kfc_fx.KFC, steps: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for x, y in steps:
        F.cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()


def make(budget: float | None, **options: object) -> tuple[nn.Module, kfc_fx.KFC]:
    net = kfc_fx.compile(network(), **options)
    statistics = kfc_fx.Statistics(budget=budget)
    return net, kfc_fx.KFC(net, 0.01, statistics=statistics, seed=3)


@settings(deadline=None)
@given(
    costs=st.dictionaries(st.text(max_size=3), st.floats(0, 1e12), min_size=1, max_size=12),
    fixed=st.floats(0, 1e10),
    total=st.floats(1, 1e13),
    full=st.integers(1, WINDOW),
)
def test_counts_stay_within_what_there_is(costs, fixed, total, full):
    found = shared_out(costs, fixed, total, full)
    lowest = min(LEVELS[0], full)
    assert found.keys() == costs.keys()
    assert all(lowest <= count <= full for count in found.values())
    spent = sum(count * costs[key] for key, count in found.items())
    # only what the lowest level costs may go beyond
    least = sum(cost * lowest for key, cost in costs.items() if found[key] == lowest)
    assert spent <= max(total, least + total) * (1 + 1e-9)
    if full * (sum(costs.values()) + 2 * fixed) < total:
        assert set(found.values()) == {full}


def test_any_window_of_a_run_is_within_the_budget():
    """By the factors that really change, step by step."""
    budget = 12.0
    net, opt = make(budget)
    changes: dict[str, list[int]] = {}
    work: dict[str, float] = {}
    gradient, before = 0.0, {}
    for step, batch in enumerate(batches(100)):
        x, y = batch
        F.cross_entropy(net(x), y).backward()
        sums = collector_of(net).sums
        engine = opt._engine
        if not step:
            gradient = sums.work
            share = collector_of(net).request.share(BATCH, "empirical")
            for stack in engine.spec.stacks:
                work[stack.key] = stack_work(engine.spec, stack, sums.rows, share).total
        opt.step()
        opt.zero_grad()
        bases = {key: state["q_omega"] for key, state in opt._engine.state.items()}
        for key, basis in bases.items():
            if basis is not before.get(key):
                changes.setdefault(key, []).append(step)
        before = bases
    assert len(work) == 4
    assert {key: len(own) for key, own in changes.items()} != dict.fromkeys(work, 20)
    for start in range(100 - WINDOW):
        spent = sum(
            work[key] * sum(start <= step < start + WINDOW for step in own)
            for key, own in changes.items()
        )
        assert spent <= budget * WINDOW * gradient
    counts = opt.schedule.most
    dearest = max(work, key=lambda key: work[key])
    cheapest = min(work, key=lambda key: work[key])
    assert counts[dearest] < counts[cheapest]
    assert most_in_window(changes[dearest]) <= counts[dearest]


def test_without_a_budget_all_are_due_together():
    net, opt = make(None)
    train(net, opt, batches(6))
    assert set(opt.schedule.most.values()) == {opt.schedule.full}
    assert opt.diagnostics.statistics_steps == opt.diagnostics.refreshes == 6


def test_blocks_that_are_not_due_give_no_statistics():
    net, opt = make(0.5)
    train(net, opt, batches(1))
    seen = {}
    for step, (x, y) in enumerate(batches(6)[1:], 1):
        F.cross_entropy(net(x), y).backward()
        seen[step] = set(collector_of(net).sums.blocks)
        due = {
            block.name
            for stack in opt._engine.spec.stacks
            if opt.schedule.statistics_due(step, stack.key)
            for block in stack.blocks
        }
        assert seen[step] == due
        opt.step()
        opt.zero_grad()
    assert seen[3] == {"0"}  # the narrow layer alone
    assert seen[4] == {"0", "2", "4", "6"}


class TwoHeads(nn.Module):
    """A cheap head and a dear one, by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.cheap, self.dear = nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 90), nn.Linear(90, 4))

    def forward(self, x: torch.Tensor, cheap: bool) -> torch.Tensor:
        return self.cheap(x) if cheap else self.dear(x)


def test_due_blocks_that_a_pass_does_not_call_are_no_lack(recwarn):
    net = kfc_fx.compile(TwoHeads())
    opt = kfc_fx.KFC(net, statistics=kfc_fx.Statistics(budget=4.0))
    for step, (x, y) in enumerate(batches(9)):
        F.cross_entropy(net(x, step == 1), y).backward()
        opt.step()
        opt.zero_grad()
    counts = opt.schedule.most
    assert counts["4x7"] == opt.schedule.full > min(counts.values())
    assert opt.diagnostics.missed_statistics == 0
    assert not recwarn.list
    while not opt.schedule.statistics_due(opt.diagnostics.steps):
        F.cross_entropy(net(x, False), y).backward()
        opt.step()
    opt.zero_grad()
    F.cross_entropy(nn.functional.linear(x, net.cheap.weight), y).backward()  # past kfc_fx
    with pytest.warns(kfc_fx.KfcWarning, match="no backward pass gave any"):
        opt.step()


def test_stacks_that_are_gone_are_due_no_longer():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 90), nn.Tanh(), nn.Linear(90, 90)]
    net = kfc_fx.compile(nn.Sequential(*layers, nn.Tanh(), nn.Linear(90, 4)))
    opt = kfc_fx.KFC(net, statistics=kfc_fx.Statistics(budget=3.0))
    train(net, opt, batches(1))
    counts = opt.schedule.most
    assert counts["6x7"] == opt.schedule.full > max(counts["90x7"], counts["90x91"])
    net[0] = nn.Identity()  # in place of the cheap one, which alone is due at most early steps
    train(net, opt, batches(3)[1:])
    assert "6x7" not in opt._engine.state
    seen = []
    for step, (x, y) in enumerate(batches(12)[3:], 3):
        due = [key for key in opt._engine.state if opt.schedule.statistics_due(step, key)]
        assert collector_of(net).armed == bool(due)
        seen.append(bool(due))
        F.cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert set(seen) == {True, False}
    assert opt.diagnostics.missed_statistics == 0


@pytest.mark.parametrize("stop", [1, 3, 7, 12])
def test_a_run_goes_on_bit_for_bit(stop):
    whole, opt = make(10.0)
    train(whole, opt, batches(40))
    assert len(set(opt.schedule.most.values())) > 1
    first, opt = make(10.0)
    train(first, opt, batches(40)[:stop])
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second, opt = make(10.0)
    second.load_state_dict(saved["net"])
    opt.load_state_dict(saved["opt"])
    train(second, opt, batches(40)[stop:])
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_failed_first_step_leaves_no_bound_behind():
    net, opt = make(0.5)
    x, y = batches(1)[0]
    before = copy.deepcopy(net.state_dict())

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle of a step")

    handle = opt._engine if opt._models[0].binding.current else None
    assert handle is None
    F.cross_entropy(net(x), y).backward()
    own = opt._models[0]
    apply, own.apply = own.apply, fail
    with pytest.raises(RuntimeError, match="in the middle"):
        opt.step()
    assert not opt.schedule.most
    own.apply = apply
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    opt.step()
    assert opt.schedule.most


def test_compiled_backends_refresh_within_the_budget():
    net, opt = make(0.5, backend="aot_eager")
    train(net, opt, batches(6))
    dues = [step for step in range(6) if opt.schedule.refresh_due(step)]
    assert opt.diagnostics.refreshes == len(dues) < 6


def test_first_factors_of_some_batches_are_of_all_blocks():
    net, opt = make(0.5)
    train(net, opt, batches(3))
    before = {block: opt.factors[block].omega.clone() for block in ("0", "2", "4", "6")}
    opt.initialize([x for x, _ in batches(2)])
    for block, omega in before.items():
        assert not torch.equal(opt.factors[block].omega, omega)


def test_a_frozen_base_counts_for_the_gradient():
    """Adapters are cheap to train beside the layers that gradients pass through."""
    wide = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 400), nn.Linear(400, 4))
    wide[2].requires_grad_(False)
    net = kfc_fx.compile(wide)
    opt = kfc_fx.KFC(net)
    F.cross_entropy(net(batches(1)[0][0]), batches(1)[0][1]).backward()
    numbers = [(6 * 400, 3), (400 * 400, 2), (400 * 4, 3)]
    flops = BATCH * sum(2 * count * passes for count, passes in numbers)
    assert collector_of(net).sums.work == flops
    opt.step()


MODELS = {
    "convolutions": (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(),
                      nn.Linear(32 * 144, 10)), (16, 3, 16, 16)),
    "tokens": (nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)), (8, 20, 24)),
    "wide": (nn.Sequential(nn.Linear(20, 600), nn.Tanh(), nn.Linear(600, 700)), (32, 20)),
}  # fmt: skip


@pytest.mark.parametrize("scaling", ["adam", "eigen"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_by_formula_is_what_inspect_counts(name, scaling):
    model, shape = MODELS[name]
    found = inspect_model(
        copy.deepcopy(model), name, [InputSpec(shape)], InspectionOptions(scaling=scaling)
    )
    spec = found.spec
    assert spec is not None
    gradient = sum(gradient_work(g).forward.flops + gradient_work(g).backward.flops
                   for g in found.graphs)  # fmt: skip
    counted = shape[0] * sum(layer_flops(g.uses.sites, found.compiled) for g in found.graphs)
    assert counted == pytest.approx(gradient, rel=0.2)
    work = update_work(spec, found.optimizer.options, found.parameters, found.groups)
    stacks: tuple[StackSpec, ...] = spec.stacks
    refresh = sum(refresh_flops(spec, stack) for stack in stacks)
    assert refresh == pytest.approx(work.refresh.flops + work.accumulate.flops, rel=0.25)
