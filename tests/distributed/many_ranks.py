"""One rank of many, whose collectives reach nobody: sizes and balance of ResNet-50."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchvision.models import resnet50

import kfc_fx
from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.owners import busiest_share, owners_of
from kfc_fx.distributed.ranks import Ranks


def main() -> None:
    """``RANKS DISTRIBUTE``: two steps; prints the share of the state and the imbalance."""
    ranks, distribute = int(sys.argv[1]), sys.argv[2]
    Ranks._wait = lambda _, work: work.wait()  # these never say that they are complete
    Attempt.settle = lambda *_: None  # what comes from others is this rank's own, cut elsewhere
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    torch.manual_seed(0)
    net = kfc_fx.compile(resnet50(num_classes=10))
    opt = kfc_fx.KFC(net, distribute=distribute)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    spec = opt._engine.spec
    held = opt._models[0].binding.held().blocks
    numbers = sum(v.numel() for own in held.values() for v in own.values())
    parameters = sum(p.numel() for p in net.parameters())
    assert all(p.isfinite().all() for p in net.parameters())
    owners = owners_of(spec, ranks)
    own = [name for name, rank in owners.items() if rank == 0]
    assert distribute == "refresh" or sorted(held) == sorted(own)
    print(f"{numbers / parameters:.4f} {ranks * busiest_share(spec, owners, ranks):.4f}")


if __name__ == "__main__":
    main()
