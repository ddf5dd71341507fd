"""For several ranks: what one rank alone does, sees or is given."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
import kfc_fx.distributed.statistics
from tests.distributed.launch import run_scenarios
from tests.distributed.training import (
    DDP,
    WHOLE,
    assert_replicas_equal,
    batch,
    everywhere,
    expect,
    joined_batch,
    made,
    net,
    own_batch,
    step_of,
    told,
)


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


def a_slow_rank_is_waited_for() -> None:
    ddp, opt = made()
    for step in range(2):
        if dist.get_rank() == 1:
            time.sleep(3)  # longer than a rank waits before it asks what is wrong
        step_of(ddp, opt, *own_batch(step))
        assert_replicas_equal(ddp)


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


SCENARIOS = [
    a_slow_rank_is_waited_for,
    looking_on_one_rank_changes_nothing,
    a_run_goes_on_after_a_checkpoint_is_loaded_on_all,
    checkpoints_of_one_rank_alone_are_found,
    an_expert_that_one_rank_does_not_use_is_a_block_on_all,
    an_expert_that_joins_between_statistics_waits_for_the_next,
    a_statistic_that_is_not_finite_on_one_rank_is_dropped_on_all,
    a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all,
    a_rank_without_statistics_goes_on_with_those_of_the_others,
    an_error_on_one_rank_takes_the_step_back_on_all,
    other_options_are_named,
    another_model_or_parameters_of_its_own_are_named,
    gradients_that_nobody_averages_are_named,
    parameters_are_compared_as_often_as_is_asked,
    ranks_find_one_likelihood,
    a_rank_whose_batch_tells_nothing_takes_the_likelihood_of_the_others,
]


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
