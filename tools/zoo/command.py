"""``kfc-fx zoo``: real models, captured, compared with the uncompiled ones, statistics checked."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kfc_fx.tools.failures import CommandError, one_line_failures, unknown_name
from kfc_fx.tools.terminal import output_console
from kfc_fx.tools.zoo.case import ZooEntry
from kfc_fx.tools.zoo.models import LIBRARIES, entries_of, matches
from kfc_fx.tools.zoo.process import Limits, ZooRow, prepare, run_entry

Rows = dict[str, ZooRow]


def zoo(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help="Parts or shell patterns of library/family/name; all models if none."),
    ] = None,
    library: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(LIBRARIES)}; repeatable.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write every row here, model by model.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows of the file, run what it lacks.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="With --resume, run also what failed before.")
    ] = False,
    list_only: Annotated[bool, typer.Option("--list", help="List the models and stop.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit of one model.")] = 120,
    memory: Annotated[float, typer.Option(min=0.5, help="Memory limit of one model, GiB.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one model.")] = 1,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks in full.")] = False,
) -> None:
    """Capture real models at reduced size, and compare them with the uncompiled ones.

    Every model runs in a process of its own; one that fails, crashes or hangs is a failed row
    with the fact that stops it. The exit code is 1 if any of them failed.
    """
    with one_line_failures(debug=debug):
        chosen = [e for e in _entries(library or []) if matches(e, patterns or [])]
        if not chosen:
            raise CommandError(f"no model of the zoo fits {' '.join(patterns or [])}; see --list")
        rows = _read(json_path) if resume and json_path else {}
    if list_only:
        typer.echo("\n".join(entry.path for entry in chosen))
        return
    failed = run(chosen, rows, json_path, Limits(seconds, memory, threads), retry=retry)
    raise typer.Exit(1 if failed else 0)


def run(
    chosen: list[ZooEntry], rows: Rows, json_path: Path | None, limits: Limits, *, retry: bool
) -> int:
    """Run what ``rows`` lacks, writing after every model; how many of the chosen ones failed."""
    console = output_console()
    prepare(sorted({LIBRARIES[entry.library] for entry in chosen}))
    for position, entry in enumerate(chosen, 1):
        known = rows.get(entry.path)
        if known and not (retry and known.status == "failed"):
            continue
        row = rows[entry.path] = run_entry(entry.path, limits)
        mark = (row.status, "green" if row.status == "passed" else "red")
        counted = f"{position}/{len(chosen)} {entry.path} "
        console.print(Text.assemble(counted, mark, f" {row.seconds} s"))
        if row.reason:
            console.print(f"    {row.reason}")
        if json_path:
            _write(json_path, rows, limits)
    results = [rows[entry.path] for entry in chosen]
    console.print(models_table(results), summary_table(results))
    return sum(row.status == "failed" for row in results)


def _entries(libraries: list[str]) -> Iterator[ZooEntry]:
    """Entries of the libraries asked for; of all that are installed if none is."""
    for library in libraries or LIBRARIES:
        if library not in LIBRARIES:
            raise unknown_name("library", library, LIBRARIES)
        try:
            yield from entries_of(library)
        except ModuleNotFoundError as error:
            if libraries:
                raise CommandError(
                    f"the zoo's {library} models need {error.name}, which is not installed: "
                    "pip install 'kfc_fx[zoo]'"
                ) from error


# -- the file ------------------------------------------------------------------------------


def _read(path: Path) -> Rows:
    if not path.exists():
        return {}
    try:
        rows = [ZooRow(**row) for row in json.loads(path.read_text())["models"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} is no file of kfc-fx zoo: {error}") from error
    return {row.path: row for row in rows}


def _write(path: Path, rows: Rows, limits: Limits) -> None:
    """Write through a second file, so that an interrupted run leaves a whole one."""
    report = {
        "machine": platform.processor() or platform.machine(),
        "limits": asdict(limits),
        "versions": dict(_versions()),
        "summary": summary(list(rows.values())),
        "models": [asdict(row) for row in rows.values()],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(_one_row_a_line(report) + "\n")
    partial.replace(path)


def _one_row_a_line(report: dict[str, Any]) -> str:
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in report["models"])
    head = json.dumps({**report, "models": []}, indent=1).removesuffix("[]\n}")
    return f"{head}[\n{rows}\n]\n}}"


def _versions() -> Iterator[tuple[str, str]]:
    yield "torch", torch.__version__
    for module in LIBRARIES.values():
        try:
            yield module, version(module)
        except PackageNotFoundError:
            continue


def summary(rows: list[ZooRow]) -> dict[str, dict[str, int]]:
    """Library to counts of what passed and failed, and was bit-equal."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        of_library = counts.setdefault(row.library, Counter())
        of_library[row.status] += 1
        of_library["bit_equal"] += bool(row.report.get("bit_equal"))
    return {library: dict(of_library) for library, of_library in counts.items()}


# -- tables --------------------------------------------------------------------------------


def models_table(rows: list[ZooRow]) -> Table:
    """One line per model."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("size")
    for heading in (
        "parameters",
        "in blocks",
        "statistics",
        "difference",
        "truth",
        "graphs",
        "breaks",
    ):
        table.add_column(heading, justify="right")
    table.add_column("capture s", justify="right")
    table.add_column("symbolic_trace")
    for row in rows:
        cells = _cells(row.report) if row.report else ["failed"]
        table.add_row(f"{row.library}/{row.name}", *cells, style="" if row.report else "red")
    return table


def _cells(report: dict[str, Any]) -> list[str]:
    return [
        report["size"],
        f"{report['parameters']:,}",
        f"{100 * report['in_blocks']:.1f} %",
        str(report["statistics"]),
        "none" if report["bit_equal"] else f"{report['largest_difference']:.0e}",
        f"{report['truth_error']:.0e} of {report['compared']}",
        str(report["graphs"]),
        str(sum(report["graph_breaks"].values())),
        f"{report['capture_seconds']:.1f}",
        report["symbolic"] if report["symbolic"] == "yes" else "no",
    ]


def summary_table(rows: list[ZooRow]) -> Table:
    """One line per library."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("library")
    for heading in ("models", "passed", "failed", "bit-equal"):
        table.add_column(heading, justify="right")
    for library, counts in summary(rows).items():
        passed, failed = counts.get("passed", 0), counts.get("failed", 0)
        numbers = (passed + failed, passed, failed)
        table.add_row(library, *map(str, (*numbers, counts["bit_equal"])))
    return table
