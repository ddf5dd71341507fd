"""What a rank of a test's program does, in a process that has imported torch before it was forked."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

import torch._dynamo
import torch.distributed.fsdp
import torch.nn.parallel  # noqa: F401 - what programs import, once for all

import kfc_fx  # noqa: F401


def run(
    module: str, arguments: Sequence[str], rank: int, ranks: int, port: str, written: str
) -> None:
    """Run a module as the main one of a rank, and write what it prints to files.

    Args:
        written: their path, without what the two streams add to it.
    """
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{written}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
