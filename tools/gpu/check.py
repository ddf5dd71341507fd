"""One command for a short visit to a GPU: every check, then the benchmarks, in one JSON.

    python -m kfc_fx.tools.gpu.check --out gpu.json

It needs torch, triton and numpy alone. Checks come first, each in a process of its own, so that
none is stopped by another's failure, be it of the device, and their kernels compile side by side;
benchmarks stop when the time is up, and what was measured by then is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kfc_fx.tools.gpu.check_processes import run_in_processes
from kfc_fx.tools.gpu.correctness import CHECKS, Check
from kfc_fx.tools.gpu.timing import CLOCKS, LAYERS, ceilings, layer_timings, step_timings

SECONDS = 230.0
PROCESSES = 6
COLUMNS = ("unfold", "structured", "im2col", "auto", "separable", "gradient")
SHOWN_CHARACTERS = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit status is 1 where a check failed, 2 where there is no GPU."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false; see --device", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    deadline = time.monotonic() + options.seconds
    results: dict[str, Any] = {"machine": machine(device), "checks": []}
    checks = [check for check in CHECKS if options.only in (None, check.name)]
    for result in _results(checks, options, deadline):
        results["checks"].append(result)
        print(_check_line(result), flush=True)
        _save(results, options.out)
    if device.type == "cuda" and not options.no_benchmarks:
        _benchmarks(results, device, deadline, options.out)
    failed = [check["name"] for check in results["checks"] if not check["passed"]]
    print(f"\n{len(checks) - len(failed)} of {len(checks)} checks passed", end="")
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
    parser.add_argument("--only", choices=[check.name for check in CHECKS], help="one check")
    parser.add_argument(
        "--processes", type=int, default=PROCESSES, help="checks at a time; 0: in this process"
    )
    return parser.parse_args(arguments)


def _results(
    checks: Sequence[Check], options: argparse.Namespace, deadline: float
) -> Iterator[dict[str, Any]]:
    if options.processes:
        names = [check.name for check in checks]
        yield from run_in_processes(
            names, options.processes, options.device, tiny=options.tiny, deadline=deadline
        )
    else:
        for check in checks:
            yield _run_check(check, torch.device(options.device), options.tiny)


def _run_check(check: Check, device: torch.device, tiny: bool) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        detail, passed = check.run(device, tiny), True
    except Exception as error:
        traceback.print_exc()
        detail, passed = f"{type(error).__name__}: {error}", False
    seconds = time.monotonic() - begin
    return {"name": check.name, "passed": passed, "seconds": seconds, "detail": detail}


def _check_line(result: dict[str, Any]) -> str:
    word = "ok    " if result["passed"] else "FAILED"
    line = f"{word} {result['name']:26} {result['seconds']:6.1f} s  {result['detail']}"
    return line[:SHOWN_CHARACTERS] if result["passed"] else line


def _benchmarks(results: dict[str, Any], device: torch.device, deadline: float, out: Path) -> None:
    results["steps"] = _attempt(lambda: step_timings(device))
    for name, value in results["steps"].items():
        print(f"{name:44} {value}")
    # Not the user's setting, which may be full precision: the baseline must use tensor cores too.
    torch.set_float32_matmul_precision("high")
    results["ceilings"] = ceilings(device)
    for name, value in results["ceilings"].items():
        print(f"{name:32} {value:9.1f}")
    results["layers"] = []
    print(f"\n{'milliseconds':41} " + " ".join(f"{name[:8]:>8}" for name in COLUMNS), end="")
    print("  plain way / auto")
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
            print("\n".join(_lines(results["layers"][-1])), flush=True)
            _save(results, out)
    _save(results, out)


def _attempt(measurement: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = measurement()
    except Exception as error:  # one shape that fails must not lose the others
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return found


def _lines(row: dict[str, Any]) -> Iterator[str]:
    head = f"{row['layer']:23} {row['dtype'].removeprefix('torch.'):9}"
    if "error" in row:
        yield f"{head} {row['error']}"
        return
    for clock in CLOCKS:
        found = [row["times"].get(name, {}).get(clock) for name in COLUMNS]
        cells = [f"{timing['median']:8.3f}" if timing else "       –" for timing in found]
        ratio = row["ratios"]["auto"].get(clock)
        yield f"{head} {clock:7} " + " ".join(cells) + (f"  {ratio:.2f}" if ratio else "")
    reasons = {f"{name}: {t['not captured']}" for name, t in row["times"].items()
               if "not captured" in t}  # fmt: skip
    yield from (f"{head} no time of the device for {reason}" for reason in sorted(reasons))


def _save(results: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
