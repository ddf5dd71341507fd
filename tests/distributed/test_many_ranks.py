"""What 8 and 512 ranks would hold and compute, by a process group that reaches nobody."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.distributed.launch import ROOT

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize(
    ("ranks", "distribute", "most_state", "most_work"),
    [(8, "update", 0.15 * 3.03, 1.25), (512, "refresh", 3.03, 50.0)],
)
def test_resnet50_steps_as_one_of_many(ranks, distribute, most_state, most_work):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.distributed.many_ranks", str(ranks), distribute],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    state, work = map(float, result.stdout.split())
    assert state <= most_state
    assert work <= most_work
