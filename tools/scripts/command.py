"""``kfc-fx bench scripts``: scripts that people run, by their own optimizer and by KFC."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kfc_fx.errors import some_of
from kfc_fx.tools.bench.figures import save_figures
from kfc_fx.tools.failures import CommandError, one_line_failures, unknown_name
from kfc_fx.tools.scripts.child import Run
from kfc_fx.tools.scripts.compared import ScriptRow, compared, end_loss
from kfc_fx.tools.scripts.table import SCRIPTS
from kfc_fx.tools.terminal import show

COLUMNS = ("script", "lines", "loss", "first step, s", "median step, ms", "likelihood", "blocks")


def scripts(
    folder: Annotated[Path, typer.Argument(help="With the checkouts, as git clone makes them.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Names of scripts; all where none is named.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of each run.")] = 40,
    data_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Data sets; else digits and made data.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="After which a run is given up.")] = 900,
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all rows here.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks in full.")] = False,
) -> None:
    """Run scripts of others twice: as they ship, and with the lines that KFC changes.

    FOLDER holds checkouts of karpathy/nanoGPT, karpathy/minGPT, kuangliu/pytorch-cifar and
    pytorch/examples, or some of them. They stay as they are: copies run. What a script would
    download is replaced. The loss is that of the script, averaged over the last fifth of the
    steps.
    """
    rows: list[ScriptRow] = []
    with one_line_failures(debug=debug):
        names = only or _found(folder)
        for name in names:
            if name not in SCRIPTS:
                raise unknown_name("script", name, SCRIPTS)
        try:
            for name in names:
                rows.append(compared(name, SCRIPTS[name], folder, data_dir, steps, seconds))
                show(_said(rows[-1]))
        finally:  # also when the user interrupts a long run
            show(table(rows, steps))
            save_figures(json_path, {"steps": steps, "rows": [as_figures(row) for row in rows]})


def _found(folder: Path) -> list[str]:
    """The scripts whose projects are in a folder.

    Raises:
        CommandError: there is none.
    """
    found = [name for name, script in SCRIPTS.items() if (folder / script.project).is_dir()]
    if not found:
        projects = sorted({script.project for script in SCRIPTS.values()})
        raise CommandError(f"{folder} has none of the checkouts {', '.join(projects)}")
    return found


def as_figures(row: ScriptRow) -> dict[str, Any]:
    """A row as plain data, with the losses at the end in place of all of them."""
    figures: dict[str, Any] = {"script": row.name, "lines": row.lines, "flags": row.flags}
    if row.failure:
        return {**figures, "failure": row.failure}
    for name, run in (("own", row.own), ("kfc", row.kfc)):
        assert run is not None
        whole = asdict(run)
        whole["losses"] = {
            loss: end_loss(own) for loss, own in zip(row.losses, run.losses, strict=True)
        }
        figures[name] = {key: value for key, value in whole.items() if value or key == "losses"}
    return figures


def table(rows: list[ScriptRow], steps: int) -> Table:
    """One line for each script: own optimizer / KFC."""
    made = Table(title=f"{steps} steps: own optimizer / KFC")
    for column in COLUMNS:
        made.add_column(column)
    for row in rows:
        lines = " ".join([str(row.lines), *row.flags])
        if row.failure or row.own is None or row.kfc is None:
            made.add_row(row.name, lines, row.failure)
            continue
        made.add_row(
            row.name,
            lines,
            _losses(row.own, row.kfc),
            f"{_number(row.own.first)} / {_number(row.kfc.first)}",
            f"{_number(row.own.median, 1e3)} / {_number(row.kfc.median, 1e3)}",
            ", ".join(model.likelihood for model in row.kfc.models),
            ", ".join(f"{model.blocks} + {len(model.generic)} generic" for model in row.kfc.models),
        )
    return made


def _losses(own: Run, kfc: Run) -> str:
    return ", ".join(
        f"{_number(end_loss(a))} / {_number(end_loss(b))}"
        for a, b in zip(own.losses, kfc.losses, strict=True)
    )


def _number(value: float | None, scale: float = 1.0) -> str:
    """Three digits or more, whole from a hundred on."""
    if value is None or not math.isfinite(value):
        return str(value)
    scaled = value * scale
    return f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def _said(row: ScriptRow) -> str:
    """What a run by KFC says beside the figures: data, generic parameters, warnings."""
    lines = [row.name + (f": {row.failure}" if row.failure else "")]
    if row.kfc is None:
        return lines[0]
    lines += [f"  data: {title}" for title in row.kfc.data]
    for model in row.kfc.models:
        lines += [f"  likelihood: {line}" for line in model.found_from]
        for reason, count in Counter(model.generic.values()).items():
            names = [name for name, own in model.generic.items() if own == reason]
            lines.append(f"  {count} generic, {reason}: {some_of(names)}")
    lines += [
        f"  warned{f' {count} times' if count > 1 else ''}: {text}"
        for text, count in Counter(row.kfc.warnings).items()
    ]
    return "\n".join(lines)
