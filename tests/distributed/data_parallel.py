"""Run by torchrun: training under ``DistributedDataParallel``."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfc_fx
import kfc_fx.distributed.statistics
from tests.distributed.launch import run_scenarios

DDP = DistributedDataParallel
SCALINGS = ("adam", "spectral", "eigen", "inverse")
WHOLE = kfc_fx.Statistics(samples=None, fisher="empirical", every=3, refresh_every=3)


class Net(nn.Module):
    """Convolutions, a norm and linear layers, none of which mixes examples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.down = nn.Conv2d(6, 4, 3, stride=2)
        self.head = nn.Linear(4 * 2 * 2, 3)
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.down(x)).flatten(1)) + torch.tanh(self.shift)


def net(kind: type[nn.Module] = Net, *, double: bool = False) -> nn.Module:
    torch.manual_seed(3)
    made = kind()
    return made.double() if double else made


def batch(step: int, rank: int, size: int = 8, *, double: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(size, 2, 6, 6, generator=generator)
    return x.double() if double else x, torch.randint(3, (size,), generator=generator)


def own_batch(step: int, **options: Any) -> tuple[Tensor, Tensor]:
    return batch(step, dist.get_rank(), **options)


def joined_batch(step: int, **options: Any) -> tuple[Tensor, Tensor]:
    parts = [batch(step, rank, **options) for rank in range(dist.get_world_size())]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def step_of(model: nn.Module, opt: kfc_fx.KFC, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


def assert_replicas_equal(model: nn.Module, what: str = "") -> None:
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert own.isfinite().all(), what
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    for rank, other in enumerate(found):
        assert torch.equal(own, other), f"rank {rank} has other parameters {what}"


def made(scaling: Any = "adam", kind: type[nn.Module] = Net, **options: Any):
    options.setdefault("statistics", WHOLE)
    ddp_options = options.pop("ddp", {})
    inner = kfc_fx.compile(net(kind))
    opt = kfc_fx.KFC(inner, scaling=scaling, seed=1, **options)
    return DDP(inner, **ddp_options), opt


@contextlib.contextmanager
def told() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


# -- W ranks are one process on the joined batch ------------------------------------------------


def factors_and_first_steps_are_those_of_one_process() -> None:
    for scaling in SCALINGS:
        for distribute in ("refresh", "update", "none"):
            inner = kfc_fx.compile(net(double=True))
            opt = kfc_fx.KFC(inner, scaling=scaling, statistics=WHOLE, distribute=distribute)
            ddp = DDP(inner)
            alone = kfc_fx.compile(net(double=True))
            its = kfc_fx.KFC(alone, scaling=scaling, statistics=WHOLE, process_group=False)
            for step in range(2):
                step_of(ddp, opt, *own_batch(step, double=True))
                step_of(alone, its, *joined_batch(step, double=True))
                if step == 0:
                    compare_factors(opt, its)
            for own, other in zip(inner.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8)


def compare_factors(opt: kfc_fx.KFC, its: kfc_fx.KFC) -> None:
    everybodys = [name for names in everywhere(list(opt.factors)) for name in names]
    assert set(everybodys) == its.factors.keys() > {"conv", "down"}
    times = 1 if opt.options.distribute == "update" else dist.get_world_size()
    assert len(everybodys) == times * len(its.factors)
    for name, expected in its.factors.items():
        if name not in opt.factors:
            continue
        kept = ("omega",) if opt.options.scaling.name == "spectral" else ("omega", "gamma")
        for factor in kept:
            one, other = getattr(opt.factors[name], factor), getattr(expected, factor)
            assert (one - other).norm() <= 1e-6 * other.norm(), (name, factor)


def uneven_batches_count_by_their_examples() -> None:
    inner = kfc_fx.compile(net(double=True))
    opt = kfc_fx.KFC(inner, statistics=WHOLE)
    ddp, rank = DDP(inner), dist.get_rank()
    sizes = [5 + 3 * each for each in range(dist.get_world_size())]
    step_of(ddp, opt, *batch(0, rank, sizes[rank], double=True))
    alone = kfc_fx.compile(net(double=True))
    its = kfc_fx.KFC(alone, statistics=WHOLE, process_group=False)
    parts = [batch(0, each, size, double=True) for each, size in enumerate(sizes)]
    step_of(alone, its, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    compare_factors(opt, its)
    assert_replicas_equal(inner)


def inverse_stays_with_one_process() -> None:
    statistics = kfc_fx.Statistics(samples=None, fisher="empirical")
    inner = kfc_fx.compile(net())
    opt, ddp = kfc_fx.KFC(inner, scaling="inverse", statistics=statistics), DDP(inner)
    alone = kfc_fx.compile(net())
    its = kfc_fx.KFC(alone, scaling="inverse", statistics=statistics, process_group=False)
    start = torch.cat([p.detach().flatten() for p in alone.parameters()]).clone()
    for step in range(20):
        step_of(ddp, opt, *own_batch(step))
        step_of(alone, its, *joined_batch(step))
    own = torch.cat([p.detach().flatten() for p in inner.parameters()])
    other = torch.cat([p.detach().flatten() for p in alone.parameters()])
    assert (own - other).norm() <= 0.01 * (other - start).norm()


# -- replicas -----------------------------------------------------------------------------------


def replicas_are_equal_to_the_bit() -> None:
    for scaling in SCALINGS:
        for distribute in ("refresh", "update", "none"):
            for fisher in ("empirical", "sampled"):
                statistics = kfc_fx.Statistics(fisher=fisher, every=3, refresh_every=6)
                ddp, opt = made(scaling, statistics=statistics, distribute=distribute)
                for step in range(14):
                    step_of(ddp, opt, *own_batch(step))
                    assert_replicas_equal(ddp, f"{scaling} {distribute} {fisher} step {step}")


def blocks_of_several_scalings_dtypes_and_options_stay_equal() -> None:
    blocks = {"down": "spectral", "head": kfc_fx.Eigen()}
    options = {"blocks": blocks, "average": 5.0, "weight_decay": 0.1, "generic": "sgd"}
    found = {}
    for distribute in ("none", "update", "refresh"):
        ddp, opt = made("adam", distribute=distribute, **options)
        for step in range(8):
            step_of(ddp, opt, *own_batch(step))
            assert_replicas_equal(ddp)
        with opt.averaged():
            assert_replicas_equal(ddp)
            found[distribute] = [p.detach().clone() for p in ddp.parameters()]
    for distribute in ("update", "refresh"):
        torch.testing.assert_close(found[distribute], found["none"], rtol=1e-3, atol=1e-4)
    for distribute in ("update", "refresh"):
        inner = kfc_fx.compile(net().bfloat16())
        opt = kfc_fx.KFC(inner, master_weights=True, statistics=WHOLE, distribute=distribute)
        ddp = DDP(inner)
        for step in range(5):
            x, y = own_batch(step)
            step_of(ddp, opt, x.bfloat16(), y)
            assert_replicas_equal(ddp)


def accumulation_with_no_sync_counts_all_micro_batches() -> None:
    ddp, opt = made()
    for step in range(4):
        opt.zero_grad()
        for part in range(3):
            quiet = ddp.no_sync() if part < 2 else contextlib.nullcontext()
            x, y = own_batch(10 * step + part)
            with quiet:
                (F.cross_entropy(ddp(x), y) / 3).backward()
        assert opt._models[0].collector.sums.examples in (0, 24)
        opt.step()
        assert_replicas_equal(ddp)


def static_graphs_and_unused_parameters_train() -> None:
    for fisher in ("empirical", "sampled"):
        for options in ({"static_graph": True}, {"find_unused_parameters": True}):
            ddp, opt = made(statistics=kfc_fx.Statistics(fisher=fisher, every=2), ddp=options)
            for step in range(5):
                step_of(ddp, opt, *own_batch(step))
                assert_replicas_equal(ddp)
            assert opt.diagnostics.missed_statistics == 0
            assert all(factors.omega.any() for factors in opt.factors.values())


def compiled_before_or_after_it_is_wrapped() -> None:
    for way in ("wrapper", "inside", "late"):
        inner = net()
        ddp = DDP(inner)
        if way == "wrapper":
            assert kfc_fx.compile(ddp) is ddp
            opt = kfc_fx.KFC(ddp, statistics=WHOLE)
        elif way == "inside":
            kfc_fx.compile(inner)
            opt = kfc_fx.KFC(ddp.parameters(), statistics=WHOLE)
        else:
            opt = kfc_fx.KFC(ddp, statistics=WHOLE)
        for step in range(3):
            step_of(ddp, opt, *own_batch(step))
            assert_replicas_equal(ddp)
        assert len(inner.kfc.plan.blocks) == 4
        assert kfc_fx.uncompile(ddp) is ddp
        assert not hasattr(inner, "kfc")


def large_models_are_one_graph() -> None:
    class Large(nn.Sequential):
        def __init__(self) -> None:
            wide = [nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 700), nn.ReLU()]
            super().__init__(nn.Flatten(), nn.Linear(72, 700), *wide, nn.Linear(700, 3))

    ddp, opt = made(kind=Large)
    for step in range(2):
        step_of(ddp, opt, *own_batch(step))
        assert_replicas_equal(ddp)
    assert len(ddp.module.kfc.graphs) == 1
    assert len(ddp.module.kfc.plan.blocks) == 4


def only_due_steps_exchange_anything() -> None:
    ddp, opt = made(statistics=kfc_fx.Statistics(every=50, refresh_every=50))
    calls: list[str] = []
    ranks = opt._ranks
    for name in ("add", "gather", "gather_objects"):
        method = getattr(ranks, name)
        setattr(ranks, name, lambda x, m=method, n=name: (calls.append(n), m(x))[1])
    found = []
    for step in range(14):
        calls.clear()
        due = opt._models[0].collector.armed
        step_of(ddp, opt, *own_batch(step))
        found.append((due, list(calls)))
    assert all(not names for due, names in found if not due), found
    assert all(names == ["gather", "add", "gather"] for due, names in found[1:] if due), found
    assert len({due for due, _ in found}) == 2


# -- what differs between ranks -------------------------------------------------------------------


class Experts(nn.Module):
    """Each rank calls another expert."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(72, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.body(x.flatten(1)))
        return self.head(torch.relu(self.experts[self.chosen](hidden)))


def an_expert_that_one_rank_does_not_use_is_a_block_on_all() -> None:
    for scaling in ("adam", "inverse"):
        ddp, opt = made(scaling, Experts, ddp={"find_unused_parameters": True})
        for step in range(10):
            ddp.module.chosen = (step + dist.get_rank()) % 2  # and the third one is never used
            step_of(ddp, opt, *own_batch(step))
            assert_replicas_equal(ddp, f"step {step}")
        blocks = {block.name for block in opt._engine.blocks}
        assert blocks == {"body", "head", "experts.0", "experts.1"}, blocks
        assert everywhere(opt.update_source).count(opt.update_source) == dist.get_world_size()
        assert opt.factors["experts.0"].omega.any()
        assert opt.factors["experts.1"].omega.any()


def an_expert_that_joins_between_statistics_waits_for_the_next() -> None:
    statistics = kfc_fx.Statistics(every=30, refresh_every=30, samples=None)
    ddp, opt = made("adam", Experts, statistics=statistics, ddp={"find_unused_parameters": True})
    for step in range(19):
        last = dist.get_rank() == dist.get_world_size() - 1
        ddp.module.chosen = int(last and step >= 9)
        step_of(ddp, opt, *own_batch(step))
        if last:
            opt.state_dict(), opt.factors
        assert_replicas_equal(ddp, f"step {step}")
    assert "experts.1" in opt.factors


def a_statistic_that_is_not_finite_on_one_rank_is_dropped_on_all() -> None:
    for distribute in ("refresh", "update", "none"):
        ddp, opt = made(distribute=distribute)
        with told() as caught:
            for step in range(5):
                x, y = own_batch(step)
                opt.zero_grad()
                F.cross_entropy(ddp(x), y).backward()
                if step == 1 and dist.get_rank() == 1:
                    opt._models[0].collector.sums.blocks["head"]["omega"][..., 0, 0] = torch.nan
                opt.step()
                assert_replicas_equal(ddp, f"step {step}")
        assert opt.diagnostics.dropped_statistics == {"head": 1}
        assert any("'head' has a statistic that is not finite" in str(w.message) for w in caught)


def a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    ddp, opt = made()
    with told():
        for step in range(5):
            x, y = own_batch(step)
            if step in (0, 2) and dist.get_rank() == 1:
                x = x * torch.nan
            before = [p.detach().clone() for p in ddp.parameters()]
            step_of(ddp, opt, x, y)
            after = [p.detach() for p in ddp.parameters()]
            same = all(map(torch.equal, before, after))
            assert same == (step in (0, 2)), step
            assert_replicas_equal(ddp, f"step {step}")
    assert opt.diagnostics.skipped_steps == 2
    assert opt.diagnostics.steps == 3


def a_rank_without_statistics_goes_on_with_those_of_the_others() -> None:
    for missed in (0, 1):
        ddp, opt = made()
        with told():
            for step in range(5):
                x, y = own_batch(step)
                opt.zero_grad()
                F.cross_entropy(ddp(x), y).backward()
                if step == missed and dist.get_rank() == 1:
                    opt._models[0].collector.take()
                opt.step()
                assert_replicas_equal(ddp, f"step {step}")
        assert len(set(everywhere(opt.diagnostics.statistics_steps))) == 1


BREAKS = [
    *(("refresh", "adam", place) for place in ("refreshed_blocks", "accumulate")),
    *(("none", "adam", place) for place in ("check_owner", "_fill", "accumulate", "refresh")),
    *(("update", "adam", place) for place in ("accumulate", "refresh", "check_owner", "_fill")),
    *(("update", "inverse", place) for place in ("accumulate", "refresh", "apply")),
    *(("update", "adam", "apply"), ("update", "inverse", "after")),
]
"""How the step is divided, its scaling, and what fails in it."""


def an_error_on_one_rank_takes_the_step_back_on_all() -> None:
    for distribute, scaling, place in BREAKS:
        ddp, opt = made(scaling, distribute=distribute)
        step_of(ddp, opt, *own_batch(0))
        before = copy.deepcopy(opt._state_dict()["state"]), [p.clone() for p in ddp.parameters()]
        raised = ""
        with broken(opt, place) if dist.get_rank() == 1 else contextlib.nullcontext():
            try:
                step_of(ddp, opt, *own_batch(1))
            except (ArithmeticError, kfc_fx.StepError) as error:
                raised = f"{type(error).__name__}: {error}"
        what = f"{distribute} {scaling} {place}"
        if dist.get_rank() == 1:
            assert raised == "ArithmeticError: on purpose", (what, raised)
        else:
            expected = "taken back on all: rank 1: ArithmeticError: on purpose"
            assert expected in raised, (what, raised)
        after = opt._state_dict()["state"], [p.clone() for p in ddp.parameters()]
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        for step in range(1, 4):
            step_of(ddp, opt, *own_batch(step))
            assert_replicas_equal(ddp, f"{what} step {step}")


@contextlib.contextmanager
def broken(opt: kfc_fx.KFC, place: str) -> Iterator[None]:
    """Let a part of the step of this rank fail."""

    def fail(*_: Any, **__: Any) -> Any:
        if place == "after":
            method(*_, **__)
        raise ArithmeticError("on purpose")

    own = opt._models[0]
    engine = own.engine(opt.param_groups)
    targets = {"check_owner": own, "_fill": kfc_fx.distributed.statistics}
    target = targets.get(place, engine)
    if place in ("apply", "after"):
        target = engine._own  # what computes the steps of this rank's blocks
    name = "apply" if place == "after" else place
    method = getattr(target, name)
    setattr(target, name, fail)
    try:
        yield
    finally:
        setattr(target, name, method)


def the_state_of_all_blocks_is_brought_to_one_rank() -> None:
    ddp, opt = made("eigen", distribute="update")
    for step in range(4):
        step_of(ddp, opt, *own_batch(step))
    names = everywhere(sorted(opt.factors))
    assert sorted(name for own in names for name in own) == ["conv", "down", "head", "norm"]
    expect(opt.state_dict, "is on other ranks: call opt.consolidate_state_dict(to=0) on all ranks")
    opt.consolidate_state_dict(to=1)
    if dist.get_rank() == 1:
        alone = kfc_fx.compile(net())
        alone.load_state_dict(ddp.module.state_dict())
        its = kfc_fx.KFC(alone, scaling="eigen", statistics=WHOLE, process_group=False)
        its.load_state_dict(opt.state_dict())
        alone.kfc.trace(own_batch(0)[0])
        for name, factors in opt.factors.items():
            torch.testing.assert_close(its.factors[name].omega, factors.omega, rtol=0, atol=0)
        assert all(factors.gamma.any() for factors in its.factors.values())
        assert its.diagnostics.steps == 4
    else:
        expect(opt.state_dict, "is on other ranks")
    step_of(ddp, opt, *own_batch(4))
    expect(opt.state_dict, "is on other ranks")  # what was brought together is of before


def a_state_that_lacks_blocks_is_refused() -> None:
    ddp, opt = made("adam", distribute="update")
    for step in range(2):
        step_of(ddp, opt, *own_batch(step))
    everybodys = everywhere(opt._state_dict())
    other, again = made("adam", distribute="update")
    again.load_state_dict(everybodys[0])  # on all ranks
    found = ""
    try:
        step_of(other, again, *own_batch(2))
    except kfc_fx.KfcError as error:
        found = str(error)
    assert "there is no state of" in found, found


def averaged_by_hand(model: nn.Module, opt: kfc_fx.KFC, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    opt.step()


def layers_that_join_keep_the_owners_of_the_others() -> None:
    inner = kfc_fx.compile(net())
    opt = kfc_fx.KFC(inner, statistics=WHOLE, distribute="update")
    inner.down.requires_grad_(False)
    for step in range(3):
        averaged_by_hand(inner, opt, *own_batch(step))
    owners = dict(opt._engine.owners)
    inner.down.requires_grad_(True)
    for step in range(3, 7):
        averaged_by_hand(inner, opt, *own_batch(step))
        assert_replicas_equal(inner, f"step {step}")
    assert owners.items() < opt._engine.owners.items()
    inner.conv.requires_grad_(False)
    for step in range(7, 24):
        averaged_by_hand(inner, opt, *own_batch(step))
    inner.conv.requires_grad_(True)
    for step in range(24, 28):
        averaged_by_hand(inner, opt, *own_batch(step))
        assert_replicas_equal(inner, f"step {step}")


def other_options_are_named() -> None:
    cases = {
        "options: lr of group 0 is 0.01 on rank 0 and 0.02 on rank 1": {"lr": 0.02},
        "weight_decay of group 0 is 0.0 on rank 0 and 0.1": {"weight_decay": 0.1},
        "scaling is Adam": {"scaling": "spectral"},
        "every=3": {"statistics": kfc_fx.Statistics(every=4, samples=None)},
    }
    for expected, options in cases.items():
        own = options if dist.get_rank() == 1 else {}
        given = {"statistics": WHOLE, **own}
        inner = kfc_fx.compile(net())
        opt, ddp = kfc_fx.KFC(inner, **given), DDP(inner)
        expect(lambda opt=opt, ddp=ddp: step_of(ddp, opt, *own_batch(0)), expected)
    inner = kfc_fx.compile(net(), norm_layers=dist.get_rank() != 1)
    opt, ddp = kfc_fx.KFC(inner, statistics=WHOLE), DDP(inner)
    expect(
        lambda: step_of(ddp, opt, *own_batch(0)), "norm_layers= of kfc_fx.compile, model 0 is True"
    )
    version, torch.__version__ = torch.__version__, f"2.{dist.get_rank()}"
    inner = kfc_fx.compile(net())
    opt, ddp = kfc_fx.KFC(inner, statistics=WHOLE), DDP(inner)
    expect(lambda: step_of(ddp, opt, *own_batch(0)), "torch is 2.0 on rank 0 and 2.1 on rank 1")
    torch.__version__ = version


def expect(action: Any, message: str) -> None:
    found = ""
    try:
        action()
    except kfc_fx.KfcError as error:
        found = str(error)
    assert message in found, f"{found!r} has not {message!r}"


def another_model_or_parameters_of_its_own_are_named() -> None:
    inner = kfc_fx.compile(net())
    opt = kfc_fx.KFC(inner, statistics=WHOLE)
    if dist.get_rank() == 1:
        with torch.no_grad():
            inner.head.bias.add_(1)
    expect(
        lambda: step_of(inner, opt, *joined_batch(0)),
        "ranks differ in their parameters: 0.head.bias",
    )
    expect(lambda: step_of(inner, opt, *joined_batch(0)), "or pass process_group=False")

    wide = kfc_fx.compile(nn.Sequential(nn.Flatten(), nn.Linear(72, 3 + dist.get_rank())))
    opt = kfc_fx.KFC(wide, statistics=WHOLE)
    expect(
        lambda: step_of(wide, opt, *own_batch(0)), "parameter 0.1.weight is (3, 72) torch.float32"
    )


def gradients_that_nobody_averages_are_named() -> None:
    inner = kfc_fx.compile(net())
    opt = kfc_fx.KFC(inner, statistics=WHOLE)
    before = [p.detach().clone() for p in inner.parameters()]
    expect(lambda: step_of(inner, opt, *own_batch(0)), "Wrap the model in DistributedDataParallel")
    assert all(map(torch.equal, before, inner.parameters()))
    for parameter in inner.parameters():  # averaged by hand
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    opt.step()
    assert_replicas_equal(inner)


def ranks_that_train_alone_do_so() -> None:
    inner = kfc_fx.compile(net())
    opt = kfc_fx.KFC(inner, statistics=WHOLE, process_group=False)
    for step in range(1 + 3 * dist.get_rank()):
        step_of(inner, opt, *own_batch(step))
    group = dist.new_group([0])
    inner = kfc_fx.compile(net())
    if dist.get_rank() == 0:
        opt = kfc_fx.KFC(inner, statistics=WHOLE, process_group=group)
        step_of(inner, opt, *own_batch(0))
    else:
        expect(lambda: kfc_fx.KFC(inner, process_group=group), "this process is not in the group")
    expect(lambda: kfc_fx.KFC(inner, process_group="world"), "process_group must be a group")


def parameters_are_compared_as_often_as_is_asked() -> None:
    statistics = kfc_fx.Statistics(every=40, refresh_every=40, samples=None)
    ddp, opt = made(statistics=statistics, compare_every=1)
    for step in range(11):
        step_of(ddp, opt, *own_batch(step))
    if dist.get_rank() == 1:
        with torch.no_grad():
            ddp.module.head.weight[0, 0] += 1e-3
    assert not opt._models[0].collector.armed
    expect(
        lambda: step_of(ddp, opt, *own_batch(11)), "ranks differ in their parameters: 0.head.weight"
    )


def ranks_find_one_likelihood() -> None:
    inner = kfc_fx.compile(net())
    opt, ddp = kfc_fx.KFC(inner, statistics=WHOLE), DDP(inner)
    with told() as caught:
        for step in range(4):
            x, y = own_batch(step)
            opt.zero_grad()
            z = ddp(x)
            squares = F.mse_loss(z, F.one_hot(y, 3).float())
            (squares if dist.get_rank() == 1 and step == 0 else F.cross_entropy(z, y)).backward()
            opt.step()
            assert_replicas_equal(ddp)
    assert repr(inner.kfc.likelihood) == "Categorical(dim=-1)", inner.kfc.likelihood
    warned = any("has found another likelihood" in str(w.message) for w in caught)
    assert warned == (dist.get_rank() == 1)


def a_rank_whose_batch_tells_nothing_takes_the_likelihood_of_the_others() -> None:
    inner = kfc_fx.compile(net())
    opt, ddp = kfc_fx.KFC(inner, statistics=WHOLE), DDP(inner)
    with told():
        for step in range(4):
            x, y = own_batch(step)
            opt.zero_grad()
            ignored = torch.full_like(y, -100)
            loss = F.cross_entropy(
                ddp(x), ignored if dist.get_rank() == 0 and step == 0 else y, reduction="sum"
            )
            loss.backward()
            opt.step()
            assert_replicas_equal(ddp)
    assert opt.diagnostics.steps == 4


def sampled_targets_differ_between_ranks() -> None:
    statistics = kfc_fx.Statistics(fisher="sampled", samples=None)
    inner = kfc_fx.compile(net(), likelihood="gaussian")
    opt, ddp = kfc_fx.KFC(inner, statistics=statistics, seed=5), DDP(inner)
    x, _ = batch(0, 0)
    opt.zero_grad()
    F.mse_loss(ddp(x), torch.zeros(8, 3)).backward()
    own = opt._models[0].collector.sums.blocks["head"]["gamma"].clone()
    assert len({float(each.sum()) for each in everywhere(own)}) == dist.get_world_size()
    opt.step()


def statistics_count_the_examples_of_all_ranks() -> None:
    ranks = dist.get_world_size()
    for fisher, least in (("empirical", 32), ("sampled", 128)):
        statistics = kfc_fx.Statistics(fisher=fisher)
        ddp, opt = made(statistics=statistics)
        record = opt._models[0].collector.begin(64, fisher=fisher)
        expected = max(-(-least // ranks), {"empirical": 16, "sampled": 32}[fisher])
        assert round(64 * record.share.fraction) == min(64, expected)
        step_of(ddp, opt, *own_batch(0))


def join_and_exact_fisher_are_refused() -> None:
    ddp, opt = made()
    with ddp.join():
        expect(lambda: ddp(own_batch(0)[0]), "cannot train within the join()")
    ddp, opt = made(kfc_fx.Inverse(clip_by="exact"))
    expect(
        lambda: step_of(ddp, opt, *own_batch(0)),
        "exact Fisher matrix",
    )


def a_copy_trains_on_as_the_original() -> None:
    ddp, opt = made()
    for step in range(3):
        step_of(ddp, opt, *own_batch(step))
    inner, its = copy.deepcopy((ddp.module, opt))
    other = DDP(inner)
    for step in range(3, 6):
        step_of(ddp, opt, *own_batch(step))
        step_of(other, its, *own_batch(step))
    torch.testing.assert_close(
        list(inner.parameters()), list(ddp.module.parameters()), rtol=0, atol=0
    )


def a_slow_rank_is_waited_for() -> None:
    ddp, opt = made()
    for step in range(2):
        if dist.get_rank() == 1:
            time.sleep(3)  # longer than a rank waits before it asks what is wrong
        step_of(ddp, opt, *own_batch(step))
        assert_replicas_equal(ddp)


def factors_from_batches_are_of_all_ranks() -> None:
    for distribute in ("refresh", "update", "none"):
        inner = kfc_fx.compile(net(), likelihood="categorical")
        opt = kfc_fx.KFC(inner, statistics=WHOLE, distribute=distribute, scaling="inverse")
        ddp = DDP(inner)
        opt.initialize([own_batch(0)[0], own_batch(1)[0]])
        own = {name: float(f.omega.sum()) for name, f in opt.factors.items()}
        if distribute != "update":
            assert everywhere(own).count(own) == dist.get_world_size()
        alone = kfc_fx.compile(net(), likelihood="categorical")
        its = kfc_fx.KFC(alone, statistics=WHOLE, process_group=False, scaling="inverse")
        its.initialize([joined_batch(0)[0], joined_batch(1)[0]])
        for name in opt.factors.keys() - {"norm"}:  # whose Ω depends on the targets that are drawn
            expected = its.factors[name].omega
            torch.testing.assert_close(opt.factors[name].omega, expected, rtol=1e-4, atol=1e-6)
        for step in range(3):
            step_of(ddp, opt, *own_batch(step))
            assert_replicas_equal(ddp, distribute)
    inner = kfc_fx.compile(net(), likelihood="categorical")
    opt = kfc_fx.KFC(inner, statistics=WHOLE)
    batches = [own_batch(0)[0]] if dist.get_rank() == 0 else []
    expect(lambda: opt.initialize(batches), "initialize got no batch")


def looking_on_one_rank_changes_nothing() -> None:
    for distribute in ("refresh", "update"):
        ddp, opt = made(distribute=distribute, statistics=kfc_fx.Statistics(every=4, samples=None))
        ddp.module.kfc.trace(own_batch(0)[0])
        for step in range(14):
            if dist.get_rank() == 0:
                with torch.no_grad():
                    ddp.module(batch(0, 7, 5)[0])
                seen = repr(opt), len(opt.state), opt.factors.keys(), opt.update_source
                assert all(seen)
                assert opt.diagnostics.as_dict()["steps"] == step
                if distribute == "refresh":
                    opt.state_dict()
            step_of(ddp, opt, *own_batch(step))
            assert_replicas_equal(ddp, f"{distribute} step {step}")


def a_layer_that_is_replaced_between_statistics_trains() -> None:
    for distribute in ("refresh", "update"):
        inner = kfc_fx.compile(net())
        statistics = kfc_fx.Statistics(every=30, refresh_every=30, samples=None)
        opt = kfc_fx.KFC(inner, statistics=statistics, distribute=distribute)
        for step in range(11):
            averaged_by_hand(inner, opt, *own_batch(step))
        assert not opt._models[0].collector.armed
        torch.manual_seed(8)
        inner.head = nn.Linear(16, 5)
        inner.shift = nn.Parameter(torch.zeros(5))
        opt.add_param_group({"params": [*inner.head.parameters(), inner.shift]})
        before = inner.head.weight.detach().clone()
        for step in range(11, 15):
            averaged_by_hand(inner, opt, *own_batch(step))
            assert_replicas_equal(inner, f"{distribute} step {step}")
        assert not torch.equal(before, inner.head.weight)


def a_layer_that_is_trained_again_keeps_its_block() -> None:
    inner = kfc_fx.compile(net())
    statistics = kfc_fx.Statistics(every=60, refresh_every=60, samples=None)
    opt = kfc_fx.KFC(inner, statistics=statistics)
    for step in range(10):
        averaged_by_hand(inner, opt, *own_batch(step))
    inner.down.requires_grad_(False)
    for step in range(10, 24):
        averaged_by_hand(inner, opt, *own_batch(step))
    inner.down.requires_grad_(True)
    while opt._models[0].schedule.statistics_due(opt.diagnostics.steps):
        averaged_by_hand(inner, opt, *own_batch(24))
    averaged_by_hand(inner, opt, *own_batch(25))
    assert "down" in {block.name for block in opt._engine.blocks}


def a_run_goes_on_after_a_checkpoint_is_loaded_on_all() -> None:
    ddp, opt = made()
    for step in range(3):
        step_of(ddp, opt, *own_batch(step))
    saved = copy.deepcopy((ddp.module.state_dict(), opt.state_dict()))
    opt._ranks._broken = "rank 1 has failed"
    expect(lambda: step_of(ddp, opt, *own_batch(3)), "rank 1 has failed")
    ddp.module.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    for step in range(3, 6):
        step_of(ddp, opt, *own_batch(step))
        assert_replicas_equal(ddp)


def checkpoints_of_one_rank_alone_are_found() -> None:
    ddp, opt = made(statistics=kfc_fx.Statistics(every=8, samples=None))
    for step in range(11):
        step_of(ddp, opt, *own_batch(step))
    if dist.get_rank() == 1:
        state = opt.state_dict()
        state["param_groups"][0]["lr"] = 0.02
    else:
        state = opt.state_dict()
    opt.load_state_dict(state)
    expect(lambda: step_of(ddp, opt, *own_batch(11)), "lr of group 0 is 0.01 on rank 0 and 0.02")


def a_whole_state_comes_from_all_owners() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    ddp, opt = made("adam", distribute="update")
    for step in range(4):
        step_of(ddp, opt, *own_batch(step))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = everywhere(get_optimizer_state_dict(ddp, opt, options=whole))[0]
    weights = ("conv.weight", "down.weight", "head.weight")
    assert all("q_omega" in state["state"][name] for name in weights), state["state"].keys()
    other, again = made("adam", distribute="update")
    other.module.load_state_dict(ddp.module.state_dict())
    set_optimizer_state_dict(other, again, state)
    for step in range(4, 7):
        step_of(ddp, opt, *own_batch(step))
        step_of(other, again, *own_batch(step))
    assert all(map(torch.equal, ddp.parameters(), other.parameters()))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    own = state if dist.get_rank() == 0 else {}
    expect(
        lambda: set_optimizer_state_dict(other, again, own, options=options),
        "broadcast_from_rank0 brings no blocks",
    )


SCENARIOS = [
    a_slow_rank_is_waited_for,
    factors_from_batches_are_of_all_ranks,
    looking_on_one_rank_changes_nothing,
    a_layer_that_is_replaced_between_statistics_trains,
    a_layer_that_is_trained_again_keeps_its_block,
    a_run_goes_on_after_a_checkpoint_is_loaded_on_all,
    checkpoints_of_one_rank_alone_are_found,
    a_whole_state_comes_from_all_owners,
    factors_and_first_steps_are_those_of_one_process,
    uneven_batches_count_by_their_examples,
    inverse_stays_with_one_process,
    replicas_are_equal_to_the_bit,
    blocks_of_several_scalings_dtypes_and_options_stay_equal,
    accumulation_with_no_sync_counts_all_micro_batches,
    static_graphs_and_unused_parameters_train,
    compiled_before_or_after_it_is_wrapped,
    large_models_are_one_graph,
    only_due_steps_exchange_anything,
    an_expert_that_one_rank_does_not_use_is_a_block_on_all,
    an_expert_that_joins_between_statistics_waits_for_the_next,
    a_statistic_that_is_not_finite_on_one_rank_is_dropped_on_all,
    a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all,
    a_rank_without_statistics_goes_on_with_those_of_the_others,
    an_error_on_one_rank_takes_the_step_back_on_all,
    the_state_of_all_blocks_is_brought_to_one_rank,
    a_state_that_lacks_blocks_is_refused,
    layers_that_join_keep_the_owners_of_the_others,
    other_options_are_named,
    another_model_or_parameters_of_its_own_are_named,
    gradients_that_nobody_averages_are_named,
    ranks_that_train_alone_do_so,
    parameters_are_compared_as_often_as_is_asked,
    ranks_find_one_likelihood,
    a_rank_whose_batch_tells_nothing_takes_the_likelihood_of_the_others,
    sampled_targets_differ_between_ranks,
    statistics_count_the_examples_of_all_ranks,
    join_and_exact_fisher_are_refused,
    a_copy_trains_on_as_the_original,
]


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
