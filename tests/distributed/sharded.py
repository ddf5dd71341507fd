"""For several ranks: training under ``fully_shard``, also with replicas of the shards (HSDP)."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfc_fx
from tests.distributed.launch import run_scenarios
from tests.distributed.training import (
    SCALINGS,
    WHOLE,
    everywhere,
    expect,
    joined_batch,
    own_batch,
    step_of,
    told,
)


class Layer(nn.Module):
    """A module that is sharded by itself. Its sides divide by no number of ranks, and a bias of two
    leaves some ranks without any of it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.linear(x))) + torch.tanh(self.shift).sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.body = nn.Sequential(Layer(5 * 36, 7), Layer(7, 9))
        self.head = nn.Linear(9, 3)
        self.again = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        for layer in self.body:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return self.head(x)


def net(*, double: bool = False) -> nn.Module:
    torch.manual_seed(3)
    return Net().double() if double else Net()


def mesh_of(kind: str) -> DeviceMesh:
    ranks = dist.get_world_size()
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (ranks,))


def sharded(kind: str = "fsdp", *, double: bool = False, **options: Any) -> nn.Module:
    model, mesh = net(double=double), mesh_of(kind)
    for module in [*model.body, model]:
        fully_shard(module, mesh=mesh, **options)
    return model


def whole(model: nn.Module) -> list[Tensor]:
    return [
        p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone()
        for p in model.parameters()
    ]


def kinds() -> list[str]:
    return ["fsdp", "hsdp"] if dist.get_world_size() % 2 == 0 else ["fsdp"]


def one_process(scaling: str, steps: int, **options: Any):
    alone = kfc_fx.compile(net(double=True))
    its = kfc_fx.KFC(alone, scaling=scaling, statistics=WHOLE, process_group=False, **options)
    for step in range(steps):
        step_of(alone, its, *joined_batch(step, double=True))
    return alone, its


def steps_are_those_of_one_process() -> None:
    for scaling in SCALINGS:
        alone, its = one_process(scaling, 1)
        for kind in kinds():
            model = kfc_fx.compile(sharded(kind, double=True))
            opt = kfc_fx.KFC(model, scaling=scaling, statistics=WHOLE)
            model.kfc.trace(own_batch(0, double=True)[0])  # layers between the sharded ones, too
            step_of(model, opt, *own_batch(0, double=True))
            names = [name for own in everywhere(list(opt.factors)) for name in own]
            assert sorted(names) == sorted(its.factors), names
            for name in opt.factors:
                expected = its.factors[name].omega
                error = (opt.factors[name].omega - expected).norm()
                assert error <= 1e-5 * expected.norm(), (kind, name)
            for own, other in zip(whole(model), alone.parameters(), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8)


def decay_averages_and_groups_are_those_of_one_process() -> None:
    options = {
        "weight_decay": 0.1,
        "cautious_decay": True,
        "average": 4.0,
        "blocks": {"head": "spectral"},
    }
    alone, its = one_process("inverse", 4, **options)
    for kind in kinds():
        model = kfc_fx.compile(sharded(kind, double=True))
        opt = kfc_fx.KFC(model, scaling="inverse", statistics=WHOLE, **options)
        model.kfc.trace(own_batch(0, double=True)[0])
        for step in range(4):
            step_of(model, opt, *own_batch(step, double=True))
        with opt.averaged(), its.averaged():
            for own, other in zip(whole(model), alone.parameters(), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
        for own, other in zip(whole(model), alone.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def policies_and_resharding_train() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for options, fisher, again in (
        ({"reshard_after_forward": True}, "empirical", False),
        ({"reshard_after_forward": True}, "sampled", True),
        ({"reshard_after_forward": False}, "sampled", False),
        ({"reshard_after_forward": False}, "empirical", True),
        ({"mp_policy": policy}, "empirical", True),
        ({"mp_policy": policy}, "sampled", False),
    ):
        model = kfc_fx.compile(sharded(**options))
        model.again = again
        statistics = kfc_fx.Statistics(fisher=fisher, every=2)
        opt = kfc_fx.KFC(model, statistics=statistics)
        losses = []
        for _ in range(12):
            x, y = own_batch(0)
            opt.zero_grad()
            loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            opt.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0], (options, fisher, again, losses)
        assert opt.diagnostics.missed_statistics == 0
        assert all(factors.omega.any() for factors in opt.factors.values())
        same = everywhere([float(p.double().sum()) for p in whole(model)])
        assert all(each == same[0] for each in same)


def a_gradient_that_is_not_finite_in_one_shard_skips_the_step_on_all() -> None:
    model = kfc_fx.compile(sharded())
    opt = kfc_fx.KFC(model, statistics=WHOLE)
    step_of(model, opt, *own_batch(0))
    before = whole(model)
    x, y = own_batch(1)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    if dist.get_rank() == 1:
        model.conv.weight.grad.to_local().fill_(torch.nan)
    with told():
        opt.step()
    assert all(map(torch.equal, before, whole(model)))
    assert opt.diagnostics.skipped_steps == 1
    step_of(model, opt, *own_batch(2))
    assert not any(map(torch.equal, before, whole(model)))


def what_is_not_sharded_by_fully_shard_is_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    flat = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    expect(lambda: kfc_fx.compile(flat), "FullyShardedDataParallel makes flat parameters")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.Linear(6, 3))
    parallelize_module(model, mesh, {"1": ColwiseParallel()})
    kfc_fx.compile(model)
    expect(lambda: kfc_fx.KFC(model), "1.weight is a DTensor that fully_shard has not made")
    half = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))["b"]
    model = net()
    fully_shard(model, mesh=half)
    opt = kfc_fx.KFC(kfc_fx.compile(model), statistics=WHOLE)
    expect(lambda: step_of(model, opt, *joined_batch(0)), "pass the process group of the mesh")


def a_group_of_its_own_trains_apart() -> None:
    ranks = dist.get_world_size()
    half = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("a", "b"))["b"]
    model = net()
    fully_shard(model, mesh=half)
    opt = kfc_fx.KFC(kfc_fx.compile(model), statistics=WHOLE, process_group=half.get_group())
    step_of(model, opt, *own_batch(0))
    assert len({float(each) for each in everywhere(whole(model)[0].sum())}) == ranks


def checkpoints_resume_bit_for_bit() -> None:
    for flattened, dtype in ((False, None), (True, None), (True, torch.bfloat16)):
        folder = everywhere(tempfile.mkdtemp())[0]
        options = StateDictOptions(flatten_optimizer_state_dict=flattened)
        model = kfc_fx.compile(sharded())
        settings = {"statistics": kfc_fx.Statistics(every=2, refresh_every=2), "average": 4.0}
        settings["state_dtype"] = dtype
        opt = kfc_fx.KFC(model, seed=2, **settings)
        for step in range(4):
            step_of(model, opt, *own_batch(step))
        kept = {e[n].dtype for e in opt.state.values() for n in ("m", "v") if n in e}
        assert kept == {dtype or torch.float32}, kept
        names = ("model", "opt")
        state = dict(zip(names, get_state_dict(model, opt, options=options), strict=True))
        dcp.save(state, checkpoint_id=folder)
        other = kfc_fx.compile(sharded())
        again = kfc_fx.KFC(other, seed=2, **settings)
        other.kfc.trace(own_batch(0)[0])
        state = dict(zip(names, get_state_dict(other, again, options=options), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            other,
            again,
            model_state_dict=state["model"],
            optim_state_dict=state["opt"],
            options=options,
        )
        for step in range(4, 8):
            step_of(model, opt, *own_batch(step))
            step_of(other, again, *own_batch(step))
        assert all(map(torch.equal, whole(model), whole(other)))
        with opt.averaged(), again.averaged():
            assert all(map(torch.equal, whole(model), whole(other)))


def a_whole_state_is_loaded_by_any_number_of_processes() -> None:
    settings = {"statistics": WHOLE, "average": 4.0}
    model = kfc_fx.compile(sharded())
    opt = kfc_fx.KFC(model, **settings)
    for step in range(4):
        step_of(model, opt, *own_batch(step))
    expect(opt.state_dict, "call opt.consolidate_state_dict(to=0) on all ranks")
    opt.consolidate_state_dict()
    state = everywhere(opt.state_dict() if dist.get_rank() == 0 else None)[0]
    parameters = whole(model)
    alone = kfc_fx.compile(net())
    for own, value in zip(alone.parameters(), parameters, strict=True):
        own.data.copy_(value)
    its = kfc_fx.KFC(alone, process_group=False, **settings)
    its.load_state_dict(state)
    alone.kfc.trace(own_batch(0)[0])
    assert its.diagnostics.steps == 4
    assert len(its.factors) == 6
    other = kfc_fx.compile(sharded())
    again = kfc_fx.KFC(other, **settings)
    with torch.no_grad():
        for own, value in zip(other.parameters(), model.parameters(), strict=True):
            own.copy_(value)
    again.load_state_dict(state)
    for step in range(4, 7):
        step_of(model, opt, *own_batch(step))
        step_of(other, again, *own_batch(step))
    assert all(map(torch.equal, whole(model), whole(other)))


def passes_without_gradients_between_steps_change_nothing() -> None:
    for parts in ("all", "root"):
        found = []
        for looks in (False, True):
            model = net()
            mesh = mesh_of("fsdp")
            for module in [*(model.body if parts == "all" else ()), model]:
                fully_shard(module, mesh=mesh)
            kfc_fx.compile(model)
            opt = kfc_fx.KFC(model, statistics=WHOLE, average=4.0)
            for step in range(6):
                step_of(model, opt, *own_batch(step))
                if looks:
                    with torch.no_grad():
                        plain = model(joined_batch(0)[0])
                    assert len(opt.state) == 14
                    with opt.averaged(), torch.no_grad():
                        assert not torch.equal(plain, model(joined_batch(0)[0]))
                    with torch.no_grad():
                        assert torch.equal(plain, model(joined_batch(0)[0]))
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
            found.append(whole(model))
        assert all(map(torch.equal, *found)), parts


def a_full_state_dict_has_the_blocks_of_all_owners() -> None:
    model = kfc_fx.compile(sharded())
    opt = kfc_fx.KFC(model, statistics=WHOLE)
    for step in range(3):
        step_of(model, opt, *own_batch(step))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_state_dict(model, opt, options=options)
    weights, state = everywhere(found)[0]
    for name in ("conv.weight", "body.0.linear.weight", "head.weight"):
        assert "q_omega" in state["state"][name], state["state"][name].keys()
        assert not isinstance(state["state"]["body.0.shift"]["m"], DTensor)
    other = kfc_fx.compile(sharded())
    again = kfc_fx.KFC(other, statistics=WHOLE)
    other.kfc.trace(own_batch(0)[0])
    set_state_dict(
        other,
        again,
        model_state_dict=weights,
        optim_state_dict=state,
        options=StateDictOptions(full_state_dict=True),
    )
    for step in range(3, 6):
        step_of(model, opt, *own_batch(step))
        step_of(other, again, *own_batch(step))
    assert all(map(torch.equal, whole(model), whole(other)))


SCENARIOS = [
    a_full_state_dict_has_the_blocks_of_all_owners,
    passes_without_gradients_between_steps_change_nothing,
    steps_are_those_of_one_process,
    decay_averages_and_groups_are_those_of_one_process,
    policies_and_resharding_train,
    a_gradient_that_is_not_finite_in_one_shard_skips_the_step_on_all,
    what_is_not_sharded_by_fully_shard_is_refused,
    a_group_of_its_own_trains_apart,
    checkpoints_resume_bit_for_bit,
    a_whole_state_is_loaded_by_any_number_of_processes,
]


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
