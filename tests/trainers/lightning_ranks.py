"""Run by torchrun: Lightning's ``ddp`` strategy on several ranks."""

from __future__ import annotations

import os

import lightning
import torch
import torch.distributed as dist

from tests.trainers.needed import loader
from tests.trainers.test_lightning import Digits


def main() -> None:
    """Print that all ranks have ended with the same parameters."""
    torch.set_num_threads(1)
    module = Digits()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp",
        **dict.fromkeys(off, False),
    )  # fmt: skip
    trainer.fit(module, loader())
    own = torch.cat([p.detach().flatten() for p in module.parameters()])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    assert all(torch.equal(own, other) for other in found)
    steps = trainer.optimizers[0].diagnostics.steps
    if trainer.is_global_zero:
        print(f"equal on both ranks after {steps} steps", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
