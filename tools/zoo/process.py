"""Run the check of one model in a process of its own, with limits on time and memory.

A fork server imports torch and the model libraries once and runs nothing else, so that every
model starts from the same fresh state without paying for the imports.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import tempfile
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from kfc_fx.tools.zoo.check import check_case, one_line
from kfc_fx.tools.zoo.models import find_entry

GIB = 2**30
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "MemoryError", "std::bad_alloc")


@dataclass(frozen=True)
class Limits:
    """What one model may use."""

    seconds: float
    memory_gib: float
    threads: int = 1


@dataclass(frozen=True)
class ZooRow:
    """One model's result: ``passed``, or ``failed`` with the fact that stops it."""

    library: str
    family: str
    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """``library/family/name``."""
        return f"{self.library}/{self.family}/{self.name}"


def prepare(libraries: list[str]) -> None:
    """Have the fork server import torch, the checks and ``libraries`` before the first model."""
    modules = ["__main__", "torch", "torch._dynamo", "kfc_fx.tools.zoo.process", *libraries]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


def run_entry(path: str, limits: Limits) -> ZooRow:
    """Check the model at ``path`` in a fresh process; a crash or a hang is a failed row."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    library, family, name = path.split("/", 2)
    with tempfile.NamedTemporaryFile(suffix=".txt") as messages:
        process = context.Process(target=_child, args=(path, limits, theirs, messages.name))
        started = time.perf_counter()
        process.start()
        theirs.close()
        try:
            answered = ours.poll(limits.seconds)
            result = _received(ours) if answered else None
            seconds = round(time.perf_counter() - started, 1)
            process.join(5 if answered else 0)
        finally:  # also when the user interrupts the run
            process.kill()
        process.join()
        if result is None:
            text = Path(messages.name).read_text(errors="replace")
            result = {"reason": _end_of(process.exitcode, answered, limits, text)}
    status = "failed" if result.get("reason") else "passed"
    return ZooRow(library, family, name, status, seconds=seconds, **result)


def _received(connection: Connection) -> dict[str, Any] | None:
    try:
        return connection.recv()
    except EOFError:
        return None


def _end_of(exit_code: int | None, answered: bool, limits: Limits, messages: str) -> str:
    """Why a process left no result."""
    if not answered:
        return f"no result within {limits.seconds:g} s"
    if _is_out_of_memory(messages):
        return _too_large(limits)
    last = " ".join(messages.strip().splitlines()[-1:])
    ended = f"signal {signal.Signals(-exit_code).name}" if exit_code and exit_code < 0 else ""
    return f"the process died: {ended or f'exit code {exit_code}'} {last}".strip()[:300]


def _child(path: str, limits: Limits, connection: Connection, messages: str) -> None:
    """Body of the process: limits, check, one answer."""
    descriptor = os.open(messages, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    size = int(limits.memory_gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    torch.set_num_threads(limits.threads)
    try:
        torch.manual_seed(0)
        result: dict[str, Any] = {"report": asdict(check_case(find_entry(path).build()))}
    except Exception as error:
        chain = "".join(one_line(e, 2000) for e in (error, error.__cause__) if e)
        too_large = _is_out_of_memory(chain)
        result = {"reason": _too_large(limits) if too_large else one_line(error, 500)}
    connection.send(result)


def _is_out_of_memory(text: str) -> bool:
    return any(phrase in text for phrase in OUT_OF_MEMORY)


def _too_large(limits: Limits) -> str:
    return f"too large for the limit of {limits.memory_gib:g} GiB"
