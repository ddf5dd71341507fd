"""The command for a GPU, tried without one: a visit to a GPU is too short to debug it there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.triton_oracle import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter stands for the GPU")


def tiny_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=9), nn.Flatten(), nn.Linear(64, 10))


def test_every_check_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kfc_fx.tools.gpu.check import CHECKS, main

    out = tmp_path / "gpu.json"
    status = main(["--device", "cpu", "--tiny", "--processes", "0", "--out", str(out)])
    assert status == 0, capsys.readouterr()
    checks = json.loads(out.read_text())["checks"]
    assert [check["name"] for check in checks] == [check.name for check in CHECKS]
    assert all(check["passed"] for check in checks)


def test_a_check_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    from kfc_fx.tools.gpu.check import main

    out = tmp_path / "gpu.json"
    command = ["--device", "cpu", "--tiny", "--only", "whitening", "--out", str(out)]
    assert main([*command, "--processes", "2"]) == 0
    (check,) = json.loads(out.read_text())["checks"]
    assert check["name"] == "whitening"
    assert main([*command, "--processes", "1", "--seconds", "0"]) == 1
    (check,) = json.loads(out.read_text())["checks"]
    assert check["detail"] == "time was up"


def test_a_failed_check_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kfc_fx.tools.gpu import check as gpu_check
    from kfc_fx.tools.gpu.correctness import Check

    def fail(device: torch.device, tiny: bool) -> str:
        raise AssertionError("bits differ")

    checks = (Check("first", fail), Check("second", lambda device, tiny: "fine"))
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--device", "cpu", "--processes", "0", "--out", str(out)]) == 1
    assert [check["passed"] for check in json.loads(out.read_text())["checks"]] == [False, True]
    assert "failed: first" in capsys.readouterr().out


def test_every_shape_that_fails_is_named() -> None:
    from kfc_fx.tools.gpu.accuracy import Comparison, Mode, summary

    half, full = Mode(torch.bfloat16, "high"), Mode(torch.float32, "highest")
    good = [Comparison((4, 2), full, 0.25), Comparison((4, 2), half, 0.5)]
    assert summary([*good, Comparison((3, 3), half, 0.75)]) == (
        "error / allowed 0.75 (3, 3), 0.50 (4, 2)"
    )
    bad = [
        Comparison((5, 5), half, 1.5),
        Comparison((6, 6), full, math.nan),
        Comparison((7, 7), full, 0.1, "the result is not symmetric"),
    ]
    with pytest.raises(AssertionError) as raised:
        summary(good + bad)
    for part in ("3 of 5", "(5, 5) bfloat16 high: error 1.5", "(6, 6)", "not symmetric"):
        assert part in str(raised.value)


def test_the_bound_of_a_sum_sees_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfc_fx.ops import cuda_dispatch
    from kfc_fx.tools.gpu.accuracy import check_large_addresses, check_row_gram

    def without_last_row(x: Tensor, bias: bool) -> Tensor:
        x = x.float()[:-1] if len(x) > 1 else x.float() * 1.01
        rows = torch.cat([x, torch.ones_like(x[:, :1])], 1) if bias else x
        return rows.mT @ rows

    monkeypatch.setattr(cuda_dispatch, "row_gram", without_last_row)
    for check in (check_row_gram, check_large_addresses):
        with pytest.raises(AssertionError, match="of allowed"):
            check(torch.device("cpu"), True)


@pytest.mark.parametrize("factor", [0, 1])
def test_a_trace_that_is_wrong_is_seen(factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kfc_fx.ops import cuda_dispatch
    from kfc_fx.tools.gpu.accuracy import check_separable_gram

    right = cuda_dispatch.separable_gram

    def wrong(x: Tensor, numbers: list[int]) -> tuple[Tensor, ...]:
        return tuple(
            gram * (1.001 if place == factor else 1.0)
            for place, gram in enumerate(right(x, numbers))
        )

    monkeypatch.setattr(cuda_dispatch, "separable_gram", wrong)
    with pytest.raises(AssertionError, match="of allowed"):
        check_separable_gram(torch.device("cpu"), True)


def test_benchmarks_fill_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kfc_fx.tools.gpu import check as gpu_check
    from kfc_fx.tools.gpu import clock as gpu_clock
    from kfc_fx.tools.gpu import timing as gpu_timing

    def call_once(calls: Sequence[Callable[[], object]], device: torch.device) -> gpu_clock.Timing:
        for call in calls:
            call()
        return gpu_clock.Timing(1.0, 1.0, 1.0)

    def refuse_im2col(
        calls: Sequence[Callable[[], object]], device: torch.device
    ) -> gpu_clock.Timing:
        refused.append(len(calls))
        if len(refused) % 8 == 3:
            raise gpu_clock.NotCapturedError("called a synchronizing CUDA operation")
        return gpu_clock.Timing(0.5, 0.5, 0.5)

    refused: list[int] = []
    monkeypatch.setattr(gpu_timing, "host_time", call_once)
    monkeypatch.setattr(gpu_timing, "device_time", refuse_im2col)
    monkeypatch.setattr(gpu_timing, "copies", lambda size, device: 2)
    for name in ("memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    layer = gpu_timing.Layer("tiny", (2, 3, 4, 5), gpu_timing._conv(3), 4)
    monkeypatch.setattr(gpu_check, "LAYERS", (layer,))
    ceilings = {f"matmul {dtype} TFLOP/s": 1.0 for dtype in (torch.bfloat16, torch.float32)}
    monkeypatch.setattr(gpu_check, "ceilings", lambda device: ceilings)
    monkeypatch.setattr(gpu_timing, "small_residual_network", tiny_network)
    monkeypatch.setattr(
        gpu_check,
        "step_timings",
        lambda device: gpu_timing.step_timings(device, batch=2, warm_up=2),
    )
    results: dict[str, object] = {}
    before = torch.get_float32_matmul_precision()
    try:
        gpu_check._benchmarks(results, torch.device("cpu"), math.inf, tmp_path / "gpu.json")
    finally:
        torch.set_float32_matmul_precision(before)
    written = json.loads((tmp_path / "gpu.json").read_text())
    shown = capsys.readouterr().out
    assert set(refused) == {2}
    assert [row["mode"] for row in written["layers"]] == ["half", "tf32"]
    for row in written["layers"]:
        assert set(row["times"]) == {
            "unfold", "structured", "im2col", "auto", "slots", "separable", "plain gradient",
            "gradient",
        }  # fmt: skip
        assert row["ratios"]["auto"]["host"] == 1.0
        assert row["work"]["structured"]["launches"] > row["work"]["im2col"]["launches"]
        assert "not captured" in row["times"]["im2col"]
        assert set(row["share of matmul"]) == {"structured", "auto"}
    assert len(written["steps"]) == 3
    assert "no time of the device for im2col: called a synchronizing" in shown
    assert "error" not in shown


def results_of_a_gpu(launch: float, rates: dict[str, float]) -> dict[str, Any]:
    """What a GPU with exactly these rates would write."""
    from kfc_fx.kernels.triton_cost import estimate
    from kfc_fx.tools.gpu.timing import LAYERS

    bandwidth, layers = 3e3, []
    for mode, rate in rates.items():
        for layer in LAYERS:
            cost = estimate(layer.geometry, layer.shape, mode, 232_448)
            work = {"structured": cost.structured, "im2col": cost.im2col}
            times = {
                name: {"host": {"median": (w.products / rate + w.moved_bytes
                                           + w.launches * launch) / bandwidth / 1e6}}
                for name, w in work.items()
            }  # fmt: skip
            row = {"mode": mode, "times": times}
            layers.append(row | {"work": {name: asdict(w) for name, w in work.items()}})
    return {"ceilings": {"copy GB/s": bandwidth}, "layers": layers}


def test_the_cost_model_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kfc_fx.tools.gpu.cost_fit import fit_cost, main

    results = results_of_a_gpu(7e7, {"half": 60.0, "tf32": 20.0})
    results["layers"].append({"layer": "failed", "error": "out of memory"})
    fitted = fit_cost(results)
    assert fitted.launch_bytes == pytest.approx(7e7)
    assert fitted.products_per_byte == pytest.approx({"half": 60.0, "tf32": 20.0})
    assert fitted.right == fitted.clear > 10
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(results))
    main([str(path)])
    assert 'PRODUCTS_PER_BYTE = {"half": 60.0, "tf32": 20.0}' in capsys.readouterr().out


def test_what_cannot_be_fitted_is_refused() -> None:
    from kfc_fx.tools.gpu.cost_fit import fit_cost

    results = results_of_a_gpu(7e7, {"half": 60.0})
    with pytest.raises(ValueError, match="0 layers with times of the device"):
        fit_cost(results, "device")
    with pytest.raises(ValueError, match="do not determine"):
        fit_cost(results_of_a_gpu(-1e6, {"half": 60.0}))


def test_inputs_in_turn_do_not_fit_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfc_fx.tools.gpu.clock import MOST_COPIES, copies

    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda")
    assert [copies(size << 20, device) for size in (60, 50, 40, 1)] == [1, 2, 3, MOST_COPIES]


def test_calls_are_timed_in_turn_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfc_fx.tools.gpu import clock as gpu_clock

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(made)

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    calls = [lambda: made.append("a"), lambda: made.append("b")]
    timing = gpu_clock.host_time(calls, torch.device("cuda"))
    assert (timing.low, timing.median, timing.high) == (1.0, 1.0, 1.0)
    assert made == [*"aba", *"ab" * 7, "a"]


def test_what_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfc_fx.tools.gpu import clock as gpu_clock

    def refuse(calls: object, device: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nat some line")

    monkeypatch.setattr(gpu_clock, "_captured", refuse)
    with pytest.raises(gpu_clock.NotCapturedError, match=r"synchronizing CUDA operation$"):
        gpu_clock.device_time([lambda: None], torch.device("cuda"))
