"""``kfc-fx bench memory`` on a small network."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from kfc_fx.tools.bench import memory as bench_memory
from kfc_fx.tools.cli import app
from kfc_fx.tools.data.networks import digits_net


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "memory.json"
    arguments = ["bench", "memory", "--model", "digits-net", "--steps", "2", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(path.read_text())["models"]
    return row, result.output


def test_counts_every_byte_of_the_states(measured):
    row, _ = measured
    parameters = sum(p.numel() for p in digits_net((1, 8, 8), 10).parameters())
    assert row["parameters"] == parameters
    assert row["parameter_bytes"] == 4 * parameters
    # Two moments and a step counter for each of the eight tensors.
    assert row["adamw"]["state_bytes"] == 2 * 4 * parameters + 4 * 8
    # Both moments and the factors, at least.
    assert row["state_ratio"] == row["kfc"]["state_bytes"] / row["parameter_bytes"] > 2


def test_trains_in_memory_beyond_the_parameters(measured):
    row, output = measured
    for optimizer in ("kfc", "adamw"):
        assert row[optimizer]["last_loss"] < row[optimizer]["first_loss"]
        assert row[optimizer]["peak_bytes"] > row["parameter_bytes"]
    assert f"{row['kfc']['peak_bytes'] / 1e9:.2f}" in output
    assert f"{row['state_ratio']:.2f}" in output


def test_peak_follows_what_is_allocated():
    before = bench_memory.peak_bytes()
    held = torch.ones(before // 4 + 10_000_000)  # as large as all that has been held so far
    assert bench_memory.peak_bytes() >= before + 40_000_000
    assert bench_memory.tensor_bytes({"a": [held], "b": 1}) == 4 * held.numel()


def test_an_unknown_model_is_refused():
    result = CliRunner().invoke(app, ["bench", "memory", "--model", "vgg61"])
    assert result.exit_code == 2
    assert "vgg16" in result.output


def test_a_process_that_dies_is_an_error():
    with pytest.raises(bench_memory.CommandError, match="exit code 1"):
        bench_memory.measure("no such workload", 1)


def test_moments_in_bfloat16_are_of_half_the_bytes():
    states = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        training = bench_memory.WORKLOADS["digits-net"]()
        states[dtype] = bench_memory._train_kfc(training, 2, dtype).state_bytes
    parameters = sum(p.numel() for p in digits_net((1, 8, 8), 10).parameters())
    assert states[torch.float32] - states[torch.bfloat16] == 2 * 2 * parameters
