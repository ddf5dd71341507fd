"""``kfc-fx kernels``: what the Triton kernels compile to, for GPUs that need not be here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import track
from rich.table import Table

from kfc_fx.tools.terminal import output_console

if TYPE_CHECKING:  # triton is optional and slow to import
    from kfc_fx.kernels.triton_case import KernelCase
    from kfc_fx.kernels.triton_offline import KernelReport

TARGET_NAMES = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")

app = typer.Typer(help="Compile the Triton kernels offline.", pretty_exceptions_enable=False)


@app.command()
def kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(help=f"GPU to compile for: {', '.join(TARGET_NAMES)}. May be repeated."),
    ] = None,
    kernel: Annotated[
        str, typer.Option(help="Only cases whose kernel, configuration or dtype contain this.")
    ] = "",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file too.")
    ] = None,
) -> None:
    """Compile every kernel in every shipped configuration and dtype, with no GPU at hand, and
    print tensor-core instructions, registers, spills, shared memory and code sizes."""
    wanted = target or list(TARGET_NAMES)
    _check_targets(wanted)
    cases = _cases(kernel)
    console = output_console()
    work = [(case, name) for name in wanted for case in cases if runs_on(case, name)]
    reports = list(_compile(track(work, "compiling", console=console, transient=True)))
    console.print(table(reports))
    faults = complaints(reports)
    for fault in faults:
        console.print(fault, style="red")
    if json_path is not None:
        content = [asdict(report) for report in reports]
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if faults:
        raise typer.Exit(1)


def runs_on(case: KernelCase, target: str) -> bool:
    """Whether a launch on ``target`` may choose the case: not where its stages do not fit."""
    from kfc_fx.kernels.triton_offline import TARGETS

    return case.least_bytes <= TARGETS[target].shared_bytes


def table(reports: Sequence[KernelReport]) -> Table:
    """One line for each compiled case."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("target", "kernel", "configuration", "dtype"):
        made.add_column(heading)
    for heading in ("tensor", "regs", "spills", "shared", "asm", "binary"):
        made.add_column(heading, justify="right")
    made.add_column("instruction")
    for report in reports:
        numbers = (
            report.tensor_instructions,
            report.registers,
            report.spills,
            report.shared,
            report.assembly_size,
            report.binary_size,
        )
        names = (report.target, report.kernel, report.config, f"{report.dtype} {report.mode}")
        made.add_row(*names, *map(str, numbers), report.tensor_opcode)
    return made


def complaints(reports: Iterable[KernelReport]) -> list[str]:
    """What no shipped configuration may do: spill, or miss the tensor cores it is made for."""
    found = []
    for report in reports:
        where = f"{report.kernel} {report.config} {report.dtype} on {report.target}"
        if report.spills:
            found.append(f"{where}: spills {report.spills}")
        if report.tensor_cores and not report.tensor_instructions:
            found.append(f"{where}: no tensor-core instruction")
    return found


def _compile(work: Iterable[tuple[KernelCase, str]]) -> Iterable[KernelReport]:
    from kfc_fx.kernels.triton_offline import TARGETS, compile_case

    for case, name in work:
        yield compile_case(case, TARGETS[name])


def _cases(kernel: str) -> list[KernelCase]:
    try:
        from kfc_fx.kernels.triton_catalogue import shipped_cases
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        raise typer.BadParameter("compiling kernels needs the package triton") from error
    cases = [case for case in shipped_cases() if kernel in case.name]
    if not cases:
        names = sorted({case.kernel_name for case in shipped_cases()})
        raise typer.BadParameter(f"no kernel matches {kernel!r}; there are {', '.join(names)}")
    return cases


def _check_targets(names: Iterable[str]) -> None:
    for name in names:
        if name not in TARGET_NAMES:
            known = ", ".join(TARGET_NAMES)
            raise typer.BadParameter(f"unknown target {name!r}; known targets: {known}")


if __name__ == "__main__":
    app()
