"""One rank of 8 and of 512: what it holds, computes and sends, by a group that reaches nobody."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize(
    ("ranks", "distribute", "most_state", "most_work"),
    [(8, "update", 0.2, 1.7), (512, "update", 0.2, 110.0)],
)
def test_resnet18_steps_as_one_of_many(ranks, distribute, most_state, most_work, tmp_path):
    found = _row(tmp_path, "resnet18", f"--ranks={ranks}", f"--distribute={distribute}")
    assert 1 / ranks <= found["state_share"] <= most_state
    assert 1 <= found["refresh_imbalance"] <= most_work
    assert found["due_bytes"] > found["plain_bytes"]
    assert found["plain_bytes"] > 0
    network = 1e9 * found["network"]
    seconds = {kind: found[f"{kind}_seconds"] for kind in ("sgd", "plain", "due")}
    gradients, plain, due = (found[f"{kind}_bytes"] / network for kind in seconds)
    mean = gradients + 0.95 * (seconds["plain"] + plain) + 0.05 * (seconds["due"] + due)
    assert found["mean_step"] == pytest.approx(mean / (seconds["sgd"] + gradients))


def test_an_unknown_model_is_named():
    command = [sys.executable, "-m", "kfc_fx.tools", "bench", "rank", "resnet1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode != 0
    assert "resnet18" in result.stderr


def _row(folder, *arguments):
    path = folder / "row.json"
    command = [sys.executable, "-W", "ignore", "-m", "kfc_fx.tools", "bench", "rank", *arguments]
    result = subprocess.run(
        [*command, "--batch=1", "--rounds=1", f"--json={path}"],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(path.read_text())
