"""For several ranks: accelerate on several ranks, in each order of ``prepare``."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.trainers.test_accelerate import ORDERS, prepared, train


def main() -> None:
    """Print that all ranks have ended with the same parameters, for each order."""
    torch.set_num_threads(1)
    for order in ORDERS:
        torch._dynamo.reset()
        accelerator, net, opt, data = prepared(order)
        train(accelerator, net, opt, data)
        own = torch.cat([p.detach().flatten() for p in net.parameters()])
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        assert all(torch.equal(own, other) for other in found)
        assert opt.optimizer.diagnostics.steps == 4
        if accelerator.is_main_process:
            print(f"{order}: equal on both ranks", flush=True)


if __name__ == "__main__":
    main()
