"""Runs checks of ``gpu_check`` in processes of their own, several at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

REPORTED_CHARACTERS = 2000


def run_in_processes(
    names: Sequence[str], processes: int, device: str, *, tiny: bool, deadline: float
) -> Iterator[dict[str, Any]]:
    """The results of the checks of these names, as they end.

    Args:
        names: of checks, the longest best first.
        processes: how many run at a time.
        device, tiny: as the command takes them.
        deadline: by ``time.monotonic()``; a check that has not ended by then has failed.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        run = partial(_run, Path(folder), device, tiny, deadline)
        for done in as_completed(
            pool.submit(run, number, name) for number, name in enumerate(names)
        ):
            yield done.result()


def _run(
    folder: Path, device: str, tiny: bool, deadline: float, number: int, name: str
) -> dict[str, Any]:
    out = folder / f"{number}.json"
    command = [
        sys.executable, "-m", "kfc_fx.tools.gpu.check", "--only", name, "--processes", "0",
        "--no-benchmarks", "--device", device, "--out", str(out), *(["--tiny"] if tiny else []),
    ]  # fmt: skip
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, errors="replace",
            timeout=max(1.0, deadline - begin),
        )  # fmt: skip
        problem = f"exit status {done.returncode}: {done.stderr[-REPORTED_CHARACTERS:]}"
    except subprocess.TimeoutExpired:
        problem = "time was up"
    checks = json.loads(out.read_text(encoding="utf-8"))["checks"] if out.exists() else []
    if checks:
        found: dict[str, Any] = checks[0]
        if not found["passed"]:
            sys.stderr.write(done.stderr[-REPORTED_CHARACTERS:])
        return found
    seconds = time.monotonic() - begin
    return {"name": name, "passed": False, "seconds": seconds, "detail": problem}
