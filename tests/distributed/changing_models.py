"""For several ranks: state whose blocks are on several ranks, and models that change."""

from __future__ import annotations

import copy
import types

import torch
import torch.distributed as dist
from torch import Tensor, nn

import kfc_fx
import kfc_fx.distributed.statistics
from kfc_fx.distributed.shards import local_of
from tests.distributed.launch import run_scenarios
from tests.distributed.training import (
    DDP,
    WHOLE,
    assert_replicas_equal,
    averaged_by_hand,
    batch,
    everywhere,
    expect,
    joined_batch,
    made,
    net,
    own_batch,
    step_of,
)


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


def a_stack_that_is_gone_is_due_no_longer() -> None:
    for distribute in ("refresh", "update"):
        torch.manual_seed(3)
        layers = [nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(72, 90), nn.Tanh()]
        inner = kfc_fx.compile(nn.Sequential(*layers, nn.Linear(90, 90), nn.Linear(90, 3)))
        statistics = kfc_fx.Statistics(budget=2.0, samples=None)
        opt = kfc_fx.KFC(inner, statistics=statistics, distribute=distribute)
        averaged_by_hand(inner, opt, *own_batch(0))
        counts = opt.schedule.most
        assert counts["2x19"] == opt.schedule.full > max(counts["90x73"], counts["90x91"])
        inner[0] = nn.Identity()  # in place of what alone is due at most early steps
        for step in range(1, 12):
            averaged_by_hand(inner, opt, *own_batch(step))
        assert opt.diagnostics.steps == 12
        assert opt.diagnostics.statistics_steps < 12
        assert_replicas_equal(inner)


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


class Table(nn.Module):
    """One block, and a table that is used twice, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 4))
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.flatten(1)[:, :10] @ self.table) @ self.table[:3].mT


def moments(opt: kfc_fx.KFC) -> dict[str, Tensor]:
    """Of the table, what this rank has of them."""
    return {name: local_of(v) for name, v in opt._models[0].binding.held().generic["table"].items()}


def moments_of_large_parameters_are_divided() -> None:
    for generic in ("adamw", "sgd"):
        options = {"generic": generic, "weight_decay": 0.1, "average": 3.0}
        options["cautious_decay"] = True
        options |= {"scaling": "inverse", "statistics": WHOLE, "seed": 1}
        inner, alone = (kfc_fx.compile(net(Table, double=True)) for _ in range(2))
        opt = kfc_fx.KFC(inner, distribute="update", **options)
        its = kfc_fx.KFC(alone, process_group=False, **options)

        for step in range(20):
            frozen = 4 <= step < 17  # steps in which the table is not trained
            for model in (inner, alone):
                model.table.requires_grad_(not frozen)
            averaged_by_hand(inner, opt, *own_batch(step, double=True))
            step_of(alone, its, *joined_batch(step, double=True))
            assert_replicas_equal(inner, f"{generic} step {step}")
            whole = moments(its)
            for name, part in moments(opt).items():
                rows = whole[name].chunk(2)[dist.get_rank()]
                torch.testing.assert_close(part, rows, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(inner.table, alone.table, rtol=1e-6, atol=1e-8)
        expect(opt.state_dict, "is on other ranks")
        inner.table.requires_grad_(False)
        for step in range(20, 34):  # so long that it has no place in the update any more
            averaged_by_hand(inner, opt, *own_batch(step, double=True))
        expect(opt.state_dict, "is on other ranks")
        opt.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            state = opt.state_dict()["state"]
            number = [id(p) for g in opt.param_groups for p in g["params"]].index(id(inner.table))
            for name, value in moments(its).items():
                torch.testing.assert_close(state[number][name], value, rtol=1e-6, atol=1e-8)


class MixedTable(Table):
    """The same with another block, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.wide(self.mix(x.flatten(1)[:, :10] @ self.table).double())
        return (mixed @ self.table[:3].double().mT).float()


def moments_stay_when_the_precision_of_the_exchange_changes() -> None:
    inner = kfc_fx.compile(net(MixedTable))
    inner.wide.requires_grad_(False)
    opt = kfc_fx.KFC(inner, distribute="update", statistics=WHOLE)
    for step in range(6):
        averaged_by_hand(inner, opt, *own_batch(step))
        assert_replicas_equal(inner)
        if step == 2:
            rows = opt._models[0].binding._engine._own.generic["table"]
            assert rows["v"].dtype == torch.float32
            rows["v"] = rows["v"] + 1000
            inner.wide.requires_grad_(True)
    assert moments(opt)["v"].dtype == torch.float64
    assert moments(opt)["v"].shape == (5, 4)
    assert moments(opt)["v"].min() > 900


def a_replaced_parameter_takes_no_rows_of_the_old_one() -> None:
    inner = kfc_fx.compile(net(Table))
    opt = kfc_fx.KFC(inner, distribute="update", statistics=WHOLE)
    for step in range(3):
        averaged_by_hand(inner, opt, *own_batch(step))
    rows = opt._models[0].binding._engine._own.generic["table"]
    rows["v"] = rows["v"] + 1000
    inner.table = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    opt.add_param_group({"params": [inner.table]})
    inner.forward = types.MethodType(shorter, inner)
    for step in range(3, 6):
        averaged_by_hand(inner, opt, *own_batch(step))
    assert moments(opt)["v"].max() < 900


def shorter(self: Table, x: Tensor) -> Tensor:
    return self.mix(x.flatten(1)[:, :5] @ self.table) @ self.table[:3].mT


def a_loaded_state_is_not_saved_in_part() -> None:
    inner = kfc_fx.compile(net(Table))
    opt = kfc_fx.KFC(inner, distribute="update", statistics=WHOLE)
    for step in range(3):
        averaged_by_hand(inner, opt, *own_batch(step))
    opt.consolidate_state_dict(to=0)
    found = [opt.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    opt.load_state_dict(found[0])
    expect(opt.state_dict, "is on other ranks")
    if dist.get_rank() == 0:
        assert "def apply" in opt.update_source  # what one rank reads, no other waits for
    averaged_by_hand(inner, opt, *own_batch(3))
    assert_replicas_equal(inner)


def one_rank_may_look_after_a_checkpoint_was_set() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    ddp, opt = made("adam", Table, distribute="update")
    for step in range(3):
        step_of(ddp, opt, *own_batch(step))
    set_optimizer_state_dict(ddp, opt, get_optimizer_state_dict(ddp, opt))
    if dist.get_rank() == 0:
        assert "def apply" in opt.update_source
    step_of(ddp, opt, *own_batch(3))
    assert_replicas_equal(ddp)


def a_group_of_some_ranks_divides_among_them() -> None:
    group = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return
    inner = kfc_fx.compile(net(Table))
    opt = kfc_fx.KFC(inner, distribute="update", statistics=WHOLE, process_group=group)
    for step in range(4):
        x, y = batch(step, 0)  # the same for both, so that gradients are those of the group
        step_of(inner, opt, x, y)
    assert moments(opt)["v"].shape == (5, 4)
    opt.consolidate_state_dict(to=1)
    if dist.get_rank() == 1:
        number = [id(p) for g in opt.param_groups for p in g["params"]].index(id(inner.table))
        assert opt.state_dict()["state"][number]["v"].shape == (10, 4)
    else:
        expect(opt.state_dict, "is on other ranks")


SCENARIOS = [
    a_group_of_some_ranks_divides_among_them,
    moments_stay_when_the_precision_of_the_exchange_changes,
    a_replaced_parameter_takes_no_rows_of_the_old_one,
    a_loaded_state_is_not_saved_in_part,
    one_rank_may_look_after_a_checkpoint_was_set,
    moments_of_large_parameters_are_divided,
    a_layer_that_is_replaced_between_statistics_trains,
    a_layer_that_is_trained_again_keeps_its_block,
    a_stack_that_is_gone_is_due_no_longer,
    a_whole_state_comes_from_all_owners,
    the_state_of_all_blocks_is_brought_to_one_rank,
    a_state_that_lacks_blocks_is_refused,
    layers_that_join_keep_the_owners_of_the_others,
    a_copy_trains_on_as_the_original,
]


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
