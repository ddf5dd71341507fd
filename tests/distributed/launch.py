"""Programs of several gloo processes, each a list of scenarios that all ranks run together."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from kfc_fx.distributed import generic_rows
from tests.distributed import forked

ROOT = Path(__file__).parents[2]
SECONDS = 60
"""For which a rank waits for the others."""
LONGEST = 400
"""Seconds that a program may take."""

Scenario = Callable[[], None]


def run_ranks(module: str, ranks: int, *arguments: str) -> str:
    """What a program of these tests prints; an error with it, where the program fails.

    Its processes are forks of one that has imported torch already, and have the environment that
    torchrun would give them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.forked"])
    port = str(_free_port())
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / str(rank) for rank in range(ranks)]
        started = [
            context.Process(
                target=forked.run, args=(module, arguments, rank, ranks, port, str(written[rank]))
            )
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        ended = _all_ended(started)
        printed, told = (
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{stream}")))
            for stream in ("stdout", "stderr")
        )
    assert ended, "\n".join([printed, *told.splitlines()[-80:]])
    return printed


def _all_ended(started: Sequence[BaseProcess]) -> bool:
    """Whether all end well; as soon as one does not, and then none goes on."""
    end = time.monotonic() + LONGEST
    try:
        left = list(started)
        while left and time.monotonic() < end:
            wait([process.sentinel for process in left], timeout=1)
            if any(process.exitcode for process in left):
                return False
            left = [process for process in left if process.exitcode is None]
        return not left
    finally:
        for process in started:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def torchrun(
    ranks: int,
    *arguments: str,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    any_end: bool = False,
) -> str:
    """What processes print that torchrun starts; an error with it, where one of them fails.

    Args:
        arguments: of torchrun, after the number of processes.
        folder: where they run.
        environment: beside that of this process.
        any_end: they may fail.
    """
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", f"--log-dir={logs}", *arguments]
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=LONGEST, check=False,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    told = [line for line in result.stderr.splitlines() if "torch/distributed" not in line]
    assert any_end or result.returncode == 0, "\n".join([result.stdout, *told[-80:]])
    return result.stdout


def run_machines(
    least: int, most: int, *arguments: str, environments: Sequence[Mapping[str, str]]
) -> list[str]:
    """What each of some machines prints, on which one torchrun starts one process. None has to end
    well.

    Args:
        least: so many may go on.
        most: so many start.
        arguments: of torchrun, after what it is told of the machines.
        environments: of each, beside that of this process; the first is the host.
    """
    port = _free_port()
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={least}:{most}"]
    command += ["--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    command += ["--rdzv-conf=timeout=60,last_call_timeout=3", "--rdzv-id=test", *arguments]
    started: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for environment in environments:
                process = subprocess.Popen(
                    [*command[:3], f"--log-dir={logs}", *command[3:]],
                    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                    env={**os.environ, **environment},
                )  # fmt: skip
                started.append(process)
                _wait_for(port)  # so that the first is the host
            return [process.communicate(timeout=LONGEST)[0] for process in started]
        finally:
            for process in started:
                process.kill()


def _wait_for(port: int) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < end, f"nobody listens on {port}"
            time.sleep(0.1)
        else:
            return


def start() -> None:
    """Join the other processes, to train nets so small that three numbers are many."""
    torch.set_num_threads(1)
    generic_rows.LEAST_NUMBERS = 3
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))


def run_scenarios(scenarios: Sequence[Scenario]) -> None:
    """Run each on all ranks, and name those that fail."""
    chosen = [each for each in scenarios if not sys.argv[1:] or each.__name__ in sys.argv[1:]]
    start()
    for scenario in chosen:
        torch._dynamo.reset()
        try:
            scenario()
        except BaseException:
            print(f"rank {dist.get_rank()}: {scenario.__name__} failed", flush=True)
            traceback.print_exc()
            raise
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"passed: {scenario.__name__}", flush=True)
    dist.destroy_process_group()
