"""The command group ``kfc-fx bench``."""

from __future__ import annotations

import typer

from kfc_fx.tools.bench.distributed import distributed
from kfc_fx.tools.bench.kernels import kernels
from kfc_fx.tools.bench.memory import memory
from kfc_fx.tools.bench.rank import rank
from kfc_fx.tools.bench.step import step
from kfc_fx.tools.bench.trainers import trainers
from kfc_fx.tools.faults.command import faults
from kfc_fx.tools.losses.command import losses
from kfc_fx.tools.race.command import train
from kfc_fx.tools.scripts.command import scripts

app = typer.Typer(
    help="Measure kernels, steps, runs, memory, ranks, trainers, scripts, losses and faults.",
    no_args_is_help=True,
)
app.command()(kernels)
app.command()(step)
app.command()(train)
app.command()(memory)
app.command()(losses)
app.command()(faults)
app.command()(distributed)
app.command()(rank)
app.command()(trainers)
app.command()(scripts)
