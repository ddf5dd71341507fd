"""``kfc-fx bench trainers``: KFC in the trainers of others, beside the optimizer of the script.

Every trainer trains a small network on the digits of scikit-learn twice, with the same data in the
same order: by AdamW, the usual choice of its scripts, and by KFC at its default rate.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kfc_fx
from kfc_fx.tools.bench.figures import save_figures
from kfc_fx.tools.failures import CommandError, one_line_failures, unknown_name
from kfc_fx.tools.terminal import show

ADAMW_RATE = 1e-3
BATCH = 64
CLASSES = 10

Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainerRow:
    """One trainer; losses are means over the training images after the last step, seconds those
    between the ends of two steps, of the first from the start of training."""

    trainer: str
    lines: int
    adamw_loss: float
    kfc_loss: float
    adamw_first: float
    kfc_first: float
    adamw_median: float
    kfc_median: float


class Clock:
    """The ends of an optimizer's steps."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.ends: list[float] = []

    def watch(self, opt: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Note the end of every step of an optimizer."""
        opt.register_step_post_hook(lambda *_: self.ends.append(time.perf_counter()))
        return opt

    def seconds(self) -> tuple[float, float]:
        """Of the first step, and the median of the others."""
        between = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return self.ends[0] - self.start, statistics.median(between)


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 8, 8]`` between 0 and 1, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(found.target)


def loader(images: Tensor, labels: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    """Batches, shuffled alike in every run."""
    order = torch.Generator().manual_seed(0)
    data = TensorDataset(images, labels)
    return DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=order)


def convolutions() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the script."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], ADAMW_RATE, weight_decay=0.0
    )


def kfc(model: nn.Module) -> torch.optim.Optimizer:
    """KFC of a model that is compiled for it, at its default rate."""
    return kfc_fx.KFC(kfc_fx.compile(model))


def by_transformers(make: Make, epochs: int, clock: Clock) -> float:
    """Hugging Face's Trainer: a ViT of two layers."""
    hf = importlib.import_module("transformers")
    images, labels = digits()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {"intermediate_size": 128, "image_size": 8, "patch_size": 2, "num_channels": 1}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, **shape, num_labels=CLASSES))
    examples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = hf.TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            dataloader_drop_last=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        opt = clock.watch(make(model))
        hf.Trainer(model, arguments, train_dataset=examples, optimizers=(opt, None)).train()
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(images).logits, labels))


def by_accelerate(make: Make, epochs: int, clock: Clock) -> float:
    """accelerate: a convolutional network."""
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    model = convolutions()
    images, labels = digits()
    opt = clock.watch(make(model))
    model, opt, data = accelerator.prepare(model, opt, loader(images, labels))
    for _ in range(epochs):
        for x, y in data:
            accelerator.backward(F.cross_entropy(model(x), y))
            opt.step()
            opt.zero_grad()
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels))


def by_lightning(make: Make, epochs: int, clock: Clock) -> float:
    """Lightning: the same network in a module."""
    lightning = importlib.import_module("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Digits(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return clock.watch(make(self))

    module, (images, labels) = Digits(), digits()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, **dict.fromkeys(off, False)
    )
    trainer.fit(module, loader(images, labels))
    with torch.no_grad():
        return float(F.cross_entropy(module.net(images), labels))


def by_timm(make: Make, epochs: int, clock: Clock) -> float:
    """timm: its smallest ResNet on images of 32 pixels, with label smoothing."""
    timm, optim = map(importlib.import_module, ("timm", "timm.optim"))
    images, labels = digits()
    images = F.interpolate(images, 32).expand(-1, 3, -1, -1).contiguous()
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    if make is kfc:
        importlib.import_module("kfc_fx.integrations.timm")
        opt = optim.create_optimizer_v2(model, "kfc")
    else:
        opt = optim.create_optimizer_v2(model, "adamw", lr=ADAMW_RATE)
    clock.watch(opt)
    for _ in range(epochs):
        for x, y in loader(images, labels):
            F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
            opt.step()
            opt.zero_grad()
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels, label_smoothing=0.1))


def by_peft(make: Make, epochs: int, clock: Clock) -> float:
    """PEFT: LoRA of rank 8 on a network of linear layers that has been trained on five digits."""
    peft = importlib.import_module("peft")
    images, labels = digits()
    base = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, CLASSES),
    )  # fmt: skip
    known = labels < CLASSES // 2
    own = torch.optim.AdamW(base.parameters(), ADAMW_RATE)
    for _ in range(2):
        for x, y in loader(images[known], labels[known]):
            F.cross_entropy(base(x), y).backward()
            own.step()
            own.zero_grad()
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["1", "3", "5"]))
    clock.start = time.perf_counter()
    opt = clock.watch(make(model))
    for _ in range(epochs):
        for x, y in loader(images, labels):
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels))


TRAINERS: dict[str, tuple[Callable[[Make, int, Clock], float], int]] = {
    "transformers": (by_transformers, 2),
    "accelerate": (by_accelerate, 2),
    "lightning": (by_lightning, 1),
    "timm": (by_timm, 2),
    "peft": (by_peft, 2),
}
"""Package to a training by it, and the lines that KFC changes."""


def measure(name: str, epochs: int) -> TrainerRow:
    """Train by one package with both optimizers, each from the same start.

    Raises:
        CommandError: the package is not installed.
    """
    train, lines = TRAINERS[name]
    losses, clocks = {}, {}
    for make in (adamw, kfc):
        torch._dynamo.reset()
        torch.manual_seed(0)
        clocks[make] = Clock()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the packages
                losses[make] = train(make, epochs, clocks[make])
        except ModuleNotFoundError as error:
            raise CommandError(f"{error}: pip install 'kfc_fx[trainers]'") from error
    (adamw_first, adamw_median), (kfc_first, kfc_median) = (
        clocks[make].seconds() for make in (adamw, kfc)
    )
    return TrainerRow(
        trainer=name,
        lines=lines,
        adamw_loss=losses[adamw],
        kfc_loss=losses[kfc],
        adamw_first=adamw_first,
        kfc_first=kfc_first,
        adamw_median=adamw_median,
        kfc_median=kfc_median,
    )


def trainers(
    name: Annotated[
        list[str] | None, typer.Argument(help="Packages; all where none is named.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Over the 1,797 digits.")] = 3,
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all rows here.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks in full.")] = False,
) -> None:
    """Train by Hugging Face's Trainer, accelerate, Lightning, timm and PEFT: KFC beside AdamW."""
    rows = []
    with one_line_failures(debug=debug):
        for own in name or TRAINERS:
            if own not in TRAINERS:
                raise unknown_name("package", own, TRAINERS)
            rows.append(measure(own, epochs))
    show(table(rows, epochs))
    save_figures(json_path, {"epochs": epochs, "rows": [asdict(row) for row in rows]})


def table(rows: list[TrainerRow], epochs: int) -> Table:
    """One line for each trainer."""
    made = Table(title=f"digits, {epochs} epochs, batch {BATCH}: AdamW / KFC")
    for column in ("trainer", "lines", "loss", "first step, s", "median step, ms"):
        made.add_column(column, justify="left" if column == "trainer" else "right")
    for row in rows:
        made.add_row(
            row.trainer,
            str(row.lines),
            f"{row.adamw_loss:.3f} / {row.kfc_loss:.3f}",
            f"{row.adamw_first:.2f} / {row.kfc_first:.2f}",
            f"{1e3 * row.adamw_median:.1f} / {1e3 * row.kfc_median:.1f}",
        )
    return made
