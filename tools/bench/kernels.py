"""``kfc-fx bench kernels``: Ω of the layers of known networks, against unfold and multiply."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.progress import track
from rich.table import Table

from kfc_fx.tools.bench.measure import Timing, peak_extra_bytes, relative_error, timings, ways
from kfc_fx.tools.bench.shapes import ConvShape, benchmark_shapes, quick_shapes
from kfc_fx.tools.terminal import output_console

BASELINES = ("unfold columns", "unfold rows")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
LARGEST_PATCHES = 2**29  # elements: unfold of more than this is left out


@dataclass(frozen=True)
class Measurement:
    """What was measured of one way on one shape; memory in bytes beyond the input."""

    timing: Timing
    peak_bytes: int
    error: float


@dataclass(frozen=True)
class ShapeResult:
    """One shape and what was measured of every way to form its Ω."""

    network: str
    label: str
    input_bytes: int
    result_bytes: int
    ways: dict[str, Measurement]


def measure(shape: ConvShape, dtype: torch.dtype, device: str) -> ShapeResult:
    """Measure every way on one shape."""
    x = torch.randn(shape.input_shape, device=device).to(dtype)
    candidates = ways(shape.geometry)
    times = timings(x, candidates, BASELINES)
    measurements = {
        name: Measurement(
            times[name], peak_extra_bytes(way, x), relative_error(way, x, shape.geometry)
        )
        for name, way in candidates.items()
        if name != "einconv"
    }
    if "einconv" in times:  # its factor has another scale
        memory = peak_extra_bytes(candidates["einconv"], x)
        measurements["einconv"] = Measurement(times["einconv"], memory, float("nan"))
    result = candidates["auto"](x)
    return ShapeResult(shape.network, shape.label, x.nbytes, result.nbytes, measurements)


def chosen_shapes(device: str, *, quick: bool = False, network: str = "") -> list[ConvShape]:
    """The shapes to measure: every distinct layer, or with ``quick`` a few of every kind.

    Args:
        network: only shapes of networks whose name contains this.
    """
    shapes = quick_shapes(device) if quick else benchmark_shapes(device)
    return [s for s in shapes if network.lower() in s.network.lower() and _fits(s)]


def _fits(shape: ConvShape) -> bool:
    images, channels, *_ = shape.input_shape
    return images * channels * shape.geometry.offsets * shape.locations <= LARGEST_PATCHES


def results_table(results: list[ShapeResult], title: str) -> Table:
    """Speed of every way over the faster form of unfold and multiply; memory; error."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("network")
    table.add_column("shape", no_wrap=True)
    names = [
        name for name in ("structured", "im2col", "auto", "einconv") if _any_has(results, name)
    ]
    for heading in ("unfold ms", *names, "memory", "of unfold", "error", "of torch"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(*_cells(result, names))
    table.caption = (
        "Times as often as fast as F.unfold and matmul (quartiles); memory of auto over that of "
        "the input and the result, and over that of unfold; error against float64."
    )
    return table


def _any_has(results: list[ShapeResult], name: str) -> bool:
    return any(name in result.ways for result in results)


def _cells(result: ShapeResult, names: list[str]) -> list[str]:
    baseline = min((result.ways[name] for name in BASELINES), key=lambda m: m.timing.seconds)
    auto = result.ways["auto"]
    needed = result.input_bytes + result.result_bytes
    return [
        result.network,
        result.label,
        f"{1e3 * baseline.timing.seconds:.2f}",
        *(_speed(result.ways.get(name)) for name in names),
        f"{auto.peak_bytes / needed:.2f}",
        f"{auto.peak_bytes / baseline.peak_bytes:.2f}",
        f"{auto.error:.0e}",
        f"{baseline.error:.0e}",
    ]


def _speed(measured: Measurement | None) -> str:
    if measured is None:
        return "–"
    timing = measured.timing
    return f"{timing.ratio:.2f} ({timing.low:.2f}–{timing.high:.2f})"


def report(results: list[ShapeResult], **settings: Any) -> dict[str, Any]:
    """All figures and what they were measured on, ready for JSON."""
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **settings,
        "shapes": [asdict(result) for result in results],
    }


def kernels(
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes of every kind.")] = False,
    network: Annotated[str, typer.Option(help="Only networks whose name contains this.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 keeps the default.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
) -> None:
    """Ω of the distinct conv layers of known networks: time, memory, error."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if threads:
        torch.set_num_threads(threads)
    settings = {"dtype": dtype, "device": device, "quick": quick, "network": network}
    shapes = chosen_shapes(device, quick=quick, network=network)
    if not shapes:
        raise typer.BadParameter(f"no network of the benchmark has {network!r} in its name")
    console, results = output_console(), []
    for shape in track(shapes, "measuring", console=console, transient=True):
        results.append(measure(shape, DTYPES[dtype], device))
        if json_path is not None:  # after each shape: what was measured outlives an interruption
            json_path.write_text(json.dumps(report(results, **settings), indent=1) + "\n")
    console.print(results_table(results, f"Patch Gram, {dtype}, {device}"))
