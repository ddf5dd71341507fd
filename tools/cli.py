"""The command line ``kfc-fx``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from kfc_fx.tools.bench.command import app as bench
from kfc_fx.tools.doctor.command import doctor
from kfc_fx.tools.inspect_command import inspect
from kfc_fx.tools.kernels_report import kernels
from kfc_fx.tools.train.command import train
from kfc_fx.tools.zoo.command import zoo

app = typer.Typer(
    name="kfc-fx",
    help="KFC for PyTorch: approximate natural gradient for an existing model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command()(inspect)
app.command()(train)
app.command()(kernels)
app.command()(zoo)
app.command()(doctor)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kfc_fx {version('kfc_fx')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """KFC for PyTorch: approximate natural gradient for an existing model."""
