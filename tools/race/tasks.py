"""The tasks of ``kfc-fx bench train``: network, data, loss, batch sizes and lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfc_fx.tools.data import sets as data_sets
from kfc_fx.tools.data.networks import kfc_cifar
from kfc_fx.tools.data.sets import DataSet, ImageSet
from kfc_fx.tools.failures import CommandError, unknown_name
from kfc_fx.tools.race.networks import CharacterGPT, VisionTransformer, autoencoder, resnet20

DataName = Literal["cifar10", "mnist", "shakespeare"]
TEXT_FILE = "tinyshakespeare.txt"
SYMBOLS = 65
CONTEXT = 64
TRAIN_SIZES = {"cifar10": 10_000, "mnist": 20_000}
TEST_SIZES = {"cifar10": 2_500, "mnist": 2_500, "shakespeare": 500}
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class CellSpec:
    """One batch size of a task; all optimizers take part where ``entrants`` is ``None``.

    ``kfc_fewer``: times fewer steps that KFC's rate is found by, where it needs that many fewer
    and large batches make whole runs dear. ``seeds``: of the best rate, where not the race's own.
    ``costs``: whether step costs are measured. ``finer``: whether each optimizer tries one more
    rate, halfway between its two best.
    """

    batch_size: int
    steps: int
    entrants: tuple[str, ...] | None = None
    kfc_fewer: int = 1
    seeds: int | None = None
    costs: bool = True
    finer: bool = False

    def of(self, chosen: tuple[str, ...]) -> tuple[str, ...]:
        """Who of ``chosen`` takes part."""
        return chosen if self.entrants is None else tuple(n for n in chosen if n in self.entrants)


@dataclass(frozen=True)
class TaskSpec:
    """A network, what it is trained on, and by which batches.

    ``head`` is the module that makes the logits, which Muon leaves to AdamW; ``None`` where the
    output is no classification.
    """

    name: str
    title: str
    data: DataName
    build: Callable[[], nn.Module]
    likelihood: Literal["categorical", "bernoulli"]
    metric: Literal["accuracy", "loss"]
    head: str | None
    cells: tuple[CellSpec, ...]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy per prediction; for pixels their sum per image, mean of images."""
        if self.likelihood == "bernoulli":
            summed = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
            return summed / len(targets)
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Examples:
    """``inputs`` and ``targets`` lead with the examples; uint8 symbols, float32 images."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Inputs and targets at ``rows``, symbols and labels as int64."""
        return _wide(self.inputs[rows]), _wide(self.targets[rows])

    def to(self, device: torch.device) -> Examples:
        """The same on a device."""
        return Examples(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class RaceData:
    """What a task trains and is tested on; ``title`` is how to quote it."""

    title: str
    train: Examples
    test: Examples

    def to(self, device: torch.device) -> RaceData:
        """The same on a device."""
        return RaceData(self.title, self.train.to(device), self.test.to(device))


FEW = ("sgd", "muon", "kfc-adam", "kfc-spectral")
SGD_ALONE = ("sgd", "kfc-adam")


def against_sgd(batch_size: int, steps: int, fewer: int, *, finer: bool = False) -> CellSpec:
    """SGD's long run, to whose end KFC is to need ``fewer`` times fewer steps, or less."""
    return CellSpec(
        batch_size, steps, SGD_ALONE, kfc_fewer=fewer, seeds=1, costs=False, finer=finer
    )


TASKS = {
    task.name: task
    for task in (
        TaskSpec(
            "kfc-cifar",
            "the paper's CIFAR-10 network",
            "cifar10",
            lambda: kfc_cifar((3, 32, 32), 10),
            "categorical",
            "accuracy",
            "10",
            (
                CellSpec(512, 42),
                CellSpec(128, 42, FEW),
                against_sgd(512, 300, 10),
                against_sgd(2048, 90, 15),
                against_sgd(4096, 140, 20, finer=True),
            ),
        ),
        TaskSpec(
            "autoencoder",
            "784-1000-500-250-30 autoencoder",
            "mnist",
            autoencoder,
            "bernoulli",
            "loss",
            None,
            (
                CellSpec(512, 42),
                against_sgd(512, 400, 15),
                CellSpec(128, 42, FEW),
            ),
        ),
        TaskSpec(
            "gpt",
            "2-layer GPT, 128 wide, 64 characters of context",
            "shakespeare",
            lambda: CharacterGPT(SYMBOLS, CONTEXT),
            "categorical",
            "loss",
            "head",
            (CellSpec(128, 42), CellSpec(32, 42, FEW)),
        ),
        TaskSpec(
            "vit",
            "small ViT, patches of 8x8",
            "cifar10",
            VisionTransformer,
            "categorical",
            "accuracy",
            "head",
            (CellSpec(512, 42), CellSpec(128, 42, FEW)),
        ),
        TaskSpec(
            "resnet20",
            "ResNet-20 with BatchNorm",
            "cifar10",
            resnet20,
            "categorical",
            "accuracy",
            "14",
            (CellSpec(128, 42),),
        ),
    )
}


def find_task(name: str) -> TaskSpec:
    """The task called ``name``, or a :class:`CommandError`."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


@lru_cache
def load(name: DataName, folder: Path, *, whole: bool = False) -> RaceData:
    """Read, shuffle and cut a data set; the same for every seed.

    Args:
        whole: cut nothing off the training images.

    Raises:
        CommandError: its files are not in ``folder``.
    """
    if name == "shakespeare":
        return _text(folder)
    size = None if whole else TRAIN_SIZES[name]
    data = data_sets.shuffled(data_sets.load(name, folder), SHUFFLE_SEED, size)
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    test = data.test.take(order[: TEST_SIZES[name]])
    return _pixels(data.title, data.train, test) if name == "mnist" else _classes(data, test)


def _pixels(title: str, train: ImageSet, test: ImageSet) -> RaceData:
    """Images as their own targets, in 0 to 1."""
    own, others = (part.images.flatten(1) / 255 for part in (train, test))
    return RaceData(title, Examples(own, own), Examples(others, others))


def _classes(data: DataSet, test: ImageSet) -> RaceData:
    """Images with zero mean and unit variance by channel, and their labels."""
    images = data.train.images.float()
    deviation, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    return RaceData(
        data.title,
        Examples((images - mean) / deviation, data.train.labels),
        Examples((test.images.float() - mean) / deviation, test.labels),
    )


def _text(folder: Path) -> RaceData:
    path = folder / TEXT_FILE
    if not path.is_file():
        raise CommandError(f"no {TEXT_FILE} in {folder} (name its folder by --data-dir)")
    text = path.read_text(encoding="utf-8")
    symbols = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
    if len(symbols) > SYMBOLS:
        raise CommandError(f"{path} has {len(symbols)} distinct characters, not {SYMBOLS}")
    numbers = torch.tensor([symbols[symbol] for symbol in text], dtype=torch.uint8)
    cut = len(numbers) * 9 // 10
    train, test = (part.unfold(0, CONTEXT + 1, 1) for part in (numbers[:cut], numbers[cut:]))
    test = test[::CONTEXT][: TEST_SIZES["shakespeare"]]
    return RaceData(
        "tiny Shakespeare",
        Examples(train[:, :-1], train[:, 1:]),
        Examples(test[:, :-1], test[:, 1:]),
    )


def _wide(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.long()
