"""
DDP
===

KFC on several processes, each with a replica of the model and batches of its own.

.. code-block:: sh

    torchrun --nproc-per-node=2 examples/ddp.py

The script is shown as it is, and was not run for this page: ``tests/distributed`` runs it with two
processes.

Handwritten digits of scikit-learn. On GPUs write ``"nccl"`` for ``"gloo"`` and move model and
batches to ``cuda``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import kfc_fx


def digits() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Training examples, and those to test with."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    return TensorDataset(images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def network() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def main() -> None:
    """Train for two epochs, and print how many of the test images are known."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    train, (images, labels) = digits()
    net = kfc_fx.compile(network())
    opt = kfc_fx.KFC(net)  # or distribute="update", where the state of one process is too much
    ddp = DistributedDataParallel(net)
    sampler = DistributedSampler(train, seed=0)
    loader = DataLoader(train, batch_size=32, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, y in loader:
            opt.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            opt.step()
    with torch.no_grad():
        known = (net(images).argmax(1) == labels).float().mean()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes: {100 * known:.1f} % of the test images")
        torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, "digits-ddp.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
