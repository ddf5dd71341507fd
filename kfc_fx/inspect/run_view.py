"""The report of a run: read, as a table, and as a picture of its plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kfc_fx.errors import KfcError
from kfc_fx.inspect.run_plots import PARTS, SERIES, run_figure
from kfc_fx.inspect.summary_view import plain_table
from kfc_fx.optim.run_report import VERSION


def read_report(path: Path) -> dict[str, Any]:
    """What ``opt.save_report`` wrote to ``path``.

    Raises:
        KfcError: there is no such file, or it is no report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        version = report["version"]
    except OSError as error:
        raise KfcError(f"the report cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise KfcError(f"{path} is no report of a run; opt.save_report writes one") from error
    if version != VERSION:
        raise KfcError(f"{path} is a report of version {version}, and this reads {VERSION}")
    return report


def save_plots(report: Mapping[str, Any], path: Path) -> None:
    """Write the plots of a report as PNG."""
    run_figure(report).savefig(path, dpi=150)


def run_view(document: Mapping[str, Any]) -> RenderableType:
    """One row for each entry of the report, then the factors, worst conditioned Ω first."""
    report = document["run"]
    return Group(_steps(report), Text(), _factors(report))


def _steps(report: Mapping[str, Any]) -> Table:
    shown = [name for name in SERIES if any(e[name] is not None for e in report["steps"])]
    columns = ("step", *shown, *(f"{part} ms" for part in PARTS))
    table = plain_table(*columns, right=columns)
    for entry in report["steps"]:
        values = ["–" if entry[name] is None else f"{entry[name]:.4g}" for name in shown]
        times = [f"{1e3 * entry['seconds'].get(part, 0.0):.2f}" for part in PARTS]
        table.add_row(str(entry["step"]), *values, *times)
    return table


def _factors(report: Mapping[str, Any]) -> Table:
    columns = ("Ω condition", "Ω effective rank", "Γ condition", "Γ effective rank")
    table = plain_table("block", *columns, right=columns)
    keys = [f"{f}_{what}" for f in ("omega", "gamma") for what in ("condition", "effective_rank")]
    ordered = sorted(report["factors"].items(), key=lambda item: -(item[1][keys[0]] or 0.0))
    for name, factor in ordered:
        values = ["–" if factor[key] is None else f"{factor[key]:.4g}" for key in keys]
        table.add_row(name or "the model itself", *values)
    return table
