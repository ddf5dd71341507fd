"""One command for a short visit to a GPU: every check, then the benchmarks, in one JSON.

    python -m kfc_fx.tools.gpu_check --out gpu.json

It needs torch, triton and numpy alone. Checks come first, and a failed one does not stop the
others; benchmarks stop when the time is up, and what was measured by then is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kfc_fx.tools.gpu_correctness import CHECKS
from kfc_fx.tools.gpu_timing import LAYERS, ceilings, layer_timings, step_timings

SECONDS = 450.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit status is 1 where a check failed, 2 where there is no GPU."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false; see --device", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    deadline = time.monotonic() + options.seconds
    results: dict[str, Any] = {"machine": machine(device), "checks": []}
    for check in CHECKS:
        results["checks"].append(_run_check(check, device, options.tiny))
        _save(results, options.out)
    if device.type == "cuda" and not options.no_benchmarks:
        _benchmarks(results, device, deadline, options.out)
    failed = [check["name"] for check in results["checks"] if not check["passed"]]
    print(f"\n{len(CHECKS) - len(failed)} of {len(CHECKS)} checks passed", end="")
    print(f"; failed: {', '.join(failed)}" if failed else "")
    print(f"written to {options.out}")
    return 1 if failed else 0


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["name"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory"] = str(properties.total_memory)
        found["driver runtime"] = str(torch.version.cuda or torch.version.hip)
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and measure the GPU kernels.")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="JSON to write")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all of it")
    parser.add_argument("--no-benchmarks", action="store_true", help="checks only")
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 to try the command"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes only")
    return parser.parse_args(arguments)


def _run_check(check: Any, device: torch.device, tiny: bool) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        detail, passed = check.run(device, tiny), True
    except Exception as error:
        traceback.print_exc()
        detail, passed = f"{type(error).__name__}: {error}", False
    seconds = time.monotonic() - begin
    print(f"{'ok    ' if passed else 'FAILED'} {check.name:26} {seconds:6.1f} s  {detail}"[:200])
    return {"name": check.name, "passed": passed, "seconds": seconds, "detail": detail}


def _benchmarks(results: dict[str, Any], device: torch.device, deadline: float, out: Path) -> None:
    results["ceilings"] = ceilings(device)
    for name, value in results["ceilings"].items():
        print(f"{name:32} {value:9.1f}")
    results["steps"] = _attempt(lambda: step_timings(device))
    for name, value in results["steps"].items():
        print(f"{name:44} {value}")
    results["layers"] = []
    print(f"\n{'layer':26} {'dtype':9} {'unfold':>8} {'struct':>8} {'im2col':>8} {'auto':>8} ratio")
    # Not the user's setting, which may be full precision: the baseline must use tensor cores too.
    torch.set_float32_matmul_precision("high")
    for dtype in (torch.bfloat16, torch.float32):
        for layer in LAYERS:
            if time.monotonic() > deadline:
                results["cut short"] = f"at {layer.name}, {dtype}"
                print("time is up: the other layers were not measured")
                break
            row = _attempt(
                lambda layer=layer, dtype=dtype: layer_timings(
                    layer, dtype, device, results["ceilings"]
                )
            )
            results["layers"].append({"layer": layer.name, "dtype": str(dtype)} | row)
            print(_line(results["layers"][-1]))
            _save(results, out)
    _save(results, out)


def _attempt(measurement: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = measurement()
    except Exception as error:  # one shape that fails must not lose the others
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return found


def _line(row: dict[str, Any]) -> str:
    names = ("unfold ms", "structured ms", "im2col ms", "auto ms", "auto ratio")
    cells = [f"{row[name]:8.3f}" if row.get(name) is not None else "       –" for name in names]
    dtype = row["dtype"].removeprefix("torch.")
    return f"{row['layer']:26} {dtype:9} " + " ".join(cells) + f"  {row.get('error', '')}"


def _save(results: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
