"""For several ranks: training under ``DistributedDataParallel`` is that of one process."""

from __future__ import annotations

import contextlib
import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import kfc_fx
import kfc_fx.distributed.statistics
from kfc_fx.tools.bench.distributed import CollectiveCounter
from tests.distributed.launch import run_scenarios
from tests.distributed.training import (
    DDP,
    SCALINGS,
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
)


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


def replicas_are_equal_to_the_bit() -> None:
    for scaling in SCALINGS:
        ways = itertools.product(("refresh", "update", "none"), ("empirical", "sampled"))
        for distribute, fisher in ways:
            statistics = kfc_fx.Statistics(fisher=fisher, every=3, refresh_every=6)
            ddp, opt = made(scaling, statistics=statistics, distribute=distribute)
            for step in range(14):
                step_of(ddp, opt, *own_batch(step))
                assert_replicas_equal(ddp, f"{scaling} {distribute} {fisher} step {step}")


def blocks_of_several_scalings_dtypes_and_options_stay_equal() -> None:
    blocks = {"down": "spectral", "head": kfc_fx.Eigen()}
    options = {"blocks": blocks, "average": 5.0, "weight_decay": 0.1, "generic": "sgd"}
    options |= {"cautious_decay": True, "max_block_norm": 0.5}
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


def moments_in_bfloat16_are_the_same_whoever_keeps_them() -> None:
    found = {}
    for distribute in ("none", "update", "refresh"):
        ddp, opt = made("adam", distribute=distribute, state_dtype=torch.bfloat16)
        for step in range(8):
            step_of(ddp, opt, *own_batch(step))
            assert_replicas_equal(ddp)
        x, y = own_batch(8)
        found[distribute] = F.cross_entropy(ddp.module(x), y).item()
        opt.consolidate_state_dict(to=0)
        (state, *_) = everywhere(opt.state_dict() if dist.get_rank() == 0 else None)
        halves = [e[name] for e in state["state"].values() for name in ("m", "v") if name in e]
        assert {moment.dtype for moment in halves} <= {torch.bfloat16}
        again, other = made("adam", distribute=distribute, state_dtype=torch.bfloat16)
        again.module.load_state_dict(ddp.module.state_dict())
        other.load_state_dict(state)
        for step in range(8, 12):
            step_of(ddp, opt, *own_batch(step))
            step_of(again, other, *own_batch(step))
        for own, expected in zip(again.parameters(), ddp.parameters(), strict=True):
            assert torch.equal(own, expected)
    assert max(found.values()) < 1.1 * min(found.values()), found


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


def the_benchmark_counts_calls_and_bytes() -> None:
    ranks = dist.get_world_size()
    for distribute, expected in (("none", (0, 3)), ("refresh", (0, 3)), ("update", (1, 3))):
        statistics = kfc_fx.Statistics(every=50, refresh_every=50)
        ddp, opt = made(statistics=statistics, distribute=distribute)
        found: dict[bool, CollectiveCounter] = {}
        for step in range(12):
            x, y = own_batch(step)
            opt.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            due = opt._models[0].collector.armed
            found[due] = counter = CollectiveCounter()
            with counter:
                opt.step()
        assert tuple(sum(found[due].calls.values()) for due in (False, True)) == expected
        blocks = sum(p.numel() for name, p in ddp.named_parameters() if "shift" not in name)
        sent = found[False].bytes
        assert sent == 0 if distribute != "update" else 4 * blocks <= sent <= 2 * ranks * 4 * blocks
        assert found[True].bytes > sent


SCENARIOS = [
    the_benchmark_counts_calls_and_bytes,
    factors_from_batches_are_of_all_ranks,
    factors_and_first_steps_are_those_of_one_process,
    uneven_batches_count_by_their_examples,
    inverse_stays_with_one_process,
    replicas_are_equal_to_the_bit,
    blocks_of_several_scalings_dtypes_and_options_stay_equal,
    moments_in_bfloat16_are_the_same_whoever_keeps_them,
    accumulation_with_no_sync_counts_all_micro_batches,
    static_graphs_and_unused_parameters_train,
    compiled_before_or_after_it_is_wrapped,
    large_models_are_one_graph,
    only_due_steps_exchange_anything,
    ranks_that_train_alone_do_so,
    sampled_targets_differ_between_ranks,
    statistics_count_the_examples_of_all_ranks,
    join_and_exact_fisher_are_refused,
]


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
