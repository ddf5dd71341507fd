"""The command ``kfc-fx train``: its options, checked before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from kfc_fx.errors import first_line
from kfc_fx.tools.data import networks
from kfc_fx.tools.failures import CommandError, import_extra, one_line_failures, writable
from kfc_fx.tools.terminal import output_console
from kfc_fx.tools.train import optimizers
from kfc_fx.tools.train.side_by_side import TrainSettings, train_side_by_side
from kfc_fx.tools.train.training_run import RunSpec

INTERRUPTED_EXIT_CODE = 130
DEFAULT_PLOT = Path("runs/train.png")


def train(
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist or cifar10.")] = "digits",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the data: torchvision's layout, or npz files."),
    ] = None,
    train_size: Annotated[
        int | None, typer.Option(help="Train on this many of the shuffled examples only.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="digits-net, digits-autoencoder, kfc-cifar, lenet, resnet18, or module:function "
            "or ./file.py:Name for your own; by default the one that suits the data."
        ),
    ] = None,
    optimizer_names: Annotated[
        str, typer.Option("--optimizers", help="Of kfc, sgd and adamw, separated by commas.")
    ] = "kfc,sgd",
    lr: Annotated[
        list[str] | None,
        typer.Option(help="Peak learning rate of one optimizer, as kfc=0.01; may be repeated."),
    ] = None,
    scaling: Annotated[
        str, typer.Option(help="KFC's scaling: adam, spectral, eigen or inverse.")
    ] = "adam",
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the parameters and of the data's order.")
    ] = 0,
    device: Annotated[str, typer.Option(help="As in torch.device.")] = "cpu",
    plot: Annotated[Path, typer.Option(help="PNG file for the loss curves.")] = DEFAULT_PLOT,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw no plot.")] = False,
    save: Annotated[Path | None, typer.Option(help="JSON file for the runs.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a network by KFC and by others side by side and compare them.

    All start from the same parameters and see the same batches. It ends with a table of the
    iterations and seconds to the same training loss, and a plot; Ctrl-C ends it early.
    """
    with one_line_failures(debug=debug):
        model = model or networks.DEFAULT_NETWORKS.get(data)
        settings = TrainSettings(
            data=data,
            data_dir=data_dir,
            train_size=train_size,
            model=model,
            optimizers=optimizers.specify(optimizer_names, lr or [], scaling, model),
            run=RunSpec(epochs, batch_size, seed, _usable_device(device)),
            plot=None if no_plot else writable("--plot", plot),
            save=writable("--save", save) if save else None,
        )
        if settings.plot:
            import_extra("matplotlib.figure", "the plot (which --no-plot leaves out)")
        if not train_side_by_side(settings, output_console()):
            raise typer.Exit(INTERRUPTED_EXIT_CODE)


def _usable_device(name: str) -> str:
    try:
        torch.zeros(1, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise CommandError(f"--device {name}: {first_line(error)}") from error
    return name
