"""Run by torchrun: Hugging Face's Trainer on several ranks."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from tests.trainers.test_transformers import losses, optimizer, trainer


def main() -> None:
    """Print what it ended with, and whether all ranks have the same parameters."""
    torch.set_num_threads(1)
    own = trainer(sys.argv[1], ddp_backend="gloo", per_device_train_batch_size=4)
    own.train()
    flat = torch.cat([p.detach().flatten() for p in own.model.parameters()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    equal = all(torch.equal(flat, other) for other in found)
    if dist.get_rank() == 0:
        steps = optimizer(own).diagnostics.steps
        print(json.dumps({"equal": equal, "steps": steps, "losses": losses(own)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
