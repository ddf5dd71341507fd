"""One rank of 8 and of 512: what it holds, computes and sends, by a group that reaches nobody."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from kfc_fx.tools.cli import app

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.fixture(scope="module")
def one_of(tmp_path_factory):
    """What is told of one rank of so many, by a run of each."""
    found = {}

    def row(ranks):
        if ranks not in found:
            found[ranks] = _row(tmp_path_factory.mktemp("row"), "resnet18", f"--ranks={ranks}")
        return found[ranks]

    return row


@pytest.mark.parametrize(("ranks", "most_work"), [(8, 1.7), (512, 110.0)])
def test_resnet18_steps_as_one_of_many(one_of, ranks, most_work):
    found = one_of(ranks)
    assert 1 / ranks <= found["state_share"] <= 0.2
    assert 1 <= found["refresh_imbalance"] <= most_work
    assert found["due_bytes"] > found["plain_bytes"] > 0
    network = 1e9 * found["network"]
    seconds = {kind: found[f"{kind}_seconds"] for kind in ("sgd", "plain", "due")}
    gradients, plain, due = (found[f"{kind}_bytes"] / network for kind in seconds)
    mean = gradients + 0.95 * (seconds["plain"] + plain) + 0.05 * (seconds["due"] + due)
    assert found["mean_step"] == pytest.approx(mean / (seconds["sgd"] + gradients))


def test_what_a_rank_really_has_is_what_inspect_counts(one_of):
    found = one_of(8)
    target = ("inspect", "torchvision.models:resnet18", "--input=1x3x224x224")
    shown = CliRunner().invoke(app, [*target, "--world=8", "--distribute=update", "--json"])
    counted = json.loads(shown.stdout)["world"]
    (own,) = (own for own in counted["owners"] if own["rank"] == found["rank"])
    whole = counted["worlds"][0]["state_bytes"]
    assert found["state_share"] == pytest.approx(own["state_bytes"] / whole, rel=1e-3)
    eight = counted["worlds"][1]
    assert found["refresh_imbalance"] == pytest.approx(eight["imbalance"])
    assert found["sgd_bytes"] == pytest.approx(eight["gradient_sent"])
    assert found["plain_bytes"] == pytest.approx(eight["step_sent"], rel=1e-2)
    assert found["due_bytes"] - found["plain_bytes"] == pytest.approx(eight["due_sent"], rel=1e-2)


def test_refreshes_alone_are_shared_with_the_state_on_all(tmp_path):
    found = _row(tmp_path, "resnet18", "--ranks=512", "--distribute=refresh")
    assert found["state_share"] == 1.0
    assert found["due_bytes"] > found["plain_bytes"] == 0


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
