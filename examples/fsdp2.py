"""
FSDP2
=====

KFC on several processes that share one model: parameters, gradients and state are sharded.

.. code-block:: sh

    torchrun --nproc-per-node=2 examples/fsdp2.py

The script is shown as it is, and was not run for this page: ``tests/distributed`` runs it with two
processes.

A small transformer that reads the rows of handwritten digits. On GPUs write ``"nccl"`` and
``"cuda"`` for ``"gloo"`` and ``"cpu"``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import kfc_fx


class Reader(nn.Module):
    """Rows of pixels as tokens."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        options = {"dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, **options) for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten digits for images ``[N, 8, 8]``."""
        x = self.embed(x) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def main() -> None:
    """Train for two epochs, print how many of the test images are known, save a checkpoint."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    labels = torch.tensor(found.target)
    train = TensorDataset(images[:1500], labels[:1500])

    model = Reader()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in [*model.layers, model]:
        fully_shard(part, mesh=mesh)
    kfc_fx.compile(model)
    opt = kfc_fx.KFC(model)

    sampler = DistributedSampler(train, seed=0)
    loader = DataLoader(train, batch_size=32, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, y in loader:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    with torch.no_grad():
        known = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes: {100 * known:.1f} % of the test images")
    model_state, opt_state = get_state_dict(model, opt)
    dcp.save({"model": model_state, "opt": opt_state}, checkpoint_id="digits-fsdp2")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
