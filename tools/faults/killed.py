"""A process that is killed while it saves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from kfc_fx.tools.faults.subject import Subject, equal, quietly


def killed_while_saving(what: str, times: int) -> Iterator[tuple[bool, bool]]:
    """Kill a process at random moments while it saves again and again.

    Args:
        what: "report" or "checkpoint".
        times: how often.

    Yields:
        Whether what is left is right, and whether it loads. A report must be whole; a checkpoint
        may be cut off if loading it raises and leaves the optimizer as it was.
    """
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        for _ in range(times):
            path.unlink(missing_ok=True)
            command = [sys.executable, "-W", "ignore", "-m", __name__, what, str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()  # it has saved once
                time.sleep(rng.uniform(0, 0.2))
                process.kill()
            yield _is_right(what, path)


def _is_right(what: str, path: Path) -> tuple[bool, bool]:
    if what == "report":
        report = json.loads(path.read_text())
        return bool(report["steps"]), True
    subject = Subject.started("adam", steps=2)
    before = subject.state()

    def load() -> None:
        subject.opt.load_state_dict(torch.load(path, weights_only=True))

    raised = quietly(load)
    after = subject.state()
    return not raised or equal(after, before), not raised


def _save_for_ever(what: str, path: Path) -> None:
    subject = Subject.started("adam", steps=1)
    while True:
        if what == "report":
            subject.opt.save_report(path)
        else:
            torch.save(subject.opt.state_dict(), path)
        print("saved", flush=True)


if __name__ == "__main__":
    _save_for_ever(sys.argv[1], Path(sys.argv[2]))
