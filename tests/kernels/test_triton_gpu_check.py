"""The command for a GPU, tried without one: a visit to a GPU is too short to debug it there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.kernels.triton_oracle import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter stands for the GPU")


def tiny_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=9), nn.Flatten(), nn.Linear(64, 10))


def test_every_check_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kfc_fx.tools.gpu_check import main

    out = tmp_path / "gpu.json"
    status = main(["--device", "cpu", "--tiny", "--out", str(out)])
    assert status == 0, capsys.readouterr()
    checks = json.loads(out.read_text())["checks"]
    assert len(checks) == 6
    assert all(check["passed"] for check in checks)


def test_a_failed_check_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kfc_fx.tools import gpu_check
    from kfc_fx.tools.gpu_correctness import Check

    def fail(device: torch.device, tiny: bool) -> str:
        raise AssertionError("bits differ")

    checks = (Check("first", fail), Check("second", lambda device, tiny: "fine"))
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 1
    assert [check["passed"] for check in json.loads(out.read_text())["checks"]] == [False, True]
    assert "failed: first" in capsys.readouterr().out


def test_benchmarks_fill_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kfc_fx.tools import gpu_check, gpu_timing

    def call_once(call: Callable[[], object], device: torch.device) -> gpu_timing.Timing:
        call()
        return gpu_timing.Timing(1.0, 1.0, 1.0)

    monkeypatch.setattr(gpu_timing, "measure", call_once)
    for name in ("memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    layer = gpu_timing.Layer("tiny", (2, 3, 4, 5), gpu_timing._conv(3))
    monkeypatch.setattr(gpu_check, "LAYERS", (layer,))
    ceilings = {f"matmul {dtype} TFLOP/s": 1.0 for dtype in (torch.bfloat16, torch.float32)}
    monkeypatch.setattr(gpu_check, "ceilings", lambda device: ceilings)
    monkeypatch.setattr(gpu_timing, "small_residual_network", tiny_network)
    monkeypatch.setattr(
        gpu_check, "step_timings", lambda device: gpu_timing.step_timings(device, batch=2)
    )
    results: dict[str, object] = {}
    before = torch.get_float32_matmul_precision()
    try:
        gpu_check._benchmarks(results, torch.device("cpu"), math.inf, tmp_path / "gpu.json")
    finally:
        torch.set_float32_matmul_precision(before)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["auto ratio"] for row in written["layers"]] == [1.0, 1.0]
    assert len(written["steps"]) == 3
    assert "error" not in capsys.readouterr().out
