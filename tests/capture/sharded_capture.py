"""For several ranks: sharded models have the factors of each rank's batch."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import kfc_fx
from kfc_fx.plan.forms import factor_forms
from kfc_fx.statistics.request import StatisticsRequest
from kfc_fx.tools.zoo.layer_truth import problems, watching_layers
from tests.capture.broken_programs import SEED
from tests.capture.test_broken_programs import Mixed, Net, Unrolled, WithoutGradients, build


class Plain(WithoutGradients):
    """Without a break of its own: those of the hooks of its shards are enough."""


def check(kind: type, fisher: str, rank: int) -> None:
    """Compare one model on one rank."""
    net = build(kind)
    reference = copy.deepcopy(net)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank)).double()
    y = torch.arange(8) % 3
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = list(net.blocks) if hasattr(net, "blocks") else [net.conv, net.up, net.table]
    for module in [*parts, net]:
        fully_shard(module, mesh=mesh)
    compiled = kfc_fx.compile(net)
    forms_of = lambda block: factor_forms(block, "dense")  # noqa: E731
    collector = compiled.kfc.attach(StatisticsRequest(forms_of, fisher=fisher, seed=SEED))
    collector.arm()
    for number in range(2):
        collector.take()
        torch.manual_seed(number)
        F.cross_entropy(compiled(x), y).backward()
    with watching_layers(reference) as truth:
        for number in range(2):
            truth.calls.clear()
            torch.manual_seed(number)
            output = reference(x)
            generator = torch.Generator().manual_seed(SEED)
            cotangent = collector.likelihood.sampled_cotangent(output.detach(), generator)
            if fisher == "sampled":
                output.backward(cotangent)
            else:
                F.cross_entropy(output, y).backward()
    scale = 1.0 if fisher == "sampled" else 64.0
    statistics = collector.take()
    found, _, compared = problems(
        compiled.kfc.plan, statistics.blocks, truth, scale, 1e-9, rows=statistics.rows
    )
    assert not found, found
    assert compared
    if kind is not Mixed:
        assert compared == 2 * len(compiled.kfc.plan.blocks) == 16


def main() -> None:
    """All models under both Fisher options."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for kind in (Net, Unrolled, Plain, Mixed):
        for fisher in ("empirical", "sampled"):
            check(kind, fisher, dist.get_rank())
            torch._dynamo.reset()
    if dist.get_rank() == 0:
        print("sharded models have true factors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
