"""Small stand-ins for data and runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kfc_fx.tools.data.sets import DataSet, ImageSet
from kfc_fx.tools.train.optimizers import OptimizerSpec
from kfc_fx.tools.train.training_run import RunRecord

DATA_FOLDER = "KFC_FX_DATA"
"""The environment variable that names a folder of real data sets."""


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that the environment names."""
    named = os.environ.get(DATA_FOLDER)
    if not named:
        pytest.skip(f"no real data: set {DATA_FOLDER} to its folder")
    assert Path(named).is_dir(), f"{DATA_FOLDER}={named} is no folder"
    return Path(named)


@pytest.fixture
def two_class_data() -> DataSet:
    """Bright images of class 1 and dark ones of class 0, 40 to train and 20 to test on."""

    def image_set(size: int, seed: int) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(size) % 2
        noise = torch.randint(0, 100, (size, 1, 8, 8), generator=generator)
        return ImageSet((noise + 100 * labels[:, None, None, None]).to(torch.uint8), labels)

    return DataSet("bright", "bright or dark", image_set(40, 1), image_set(20, 2))


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    """A record of given losses, with a step every second after half a second of capture."""

    def make(name: str, losses: list[float], planned_steps: int | None = None) -> RunRecord:
        return RunRecord(
            optimizer=OptimizerSpec(name, 0.1, "adam" if name == "kfc" else None),
            planned_steps=planned_steps or len(losses),
            capture_seconds=0.5,
            losses=tuple(losses),
            seconds=tuple(0.5 + step for step in range(1, len(losses) + 1)),
            tested=(0.5, 0.75),
        )

    return make
