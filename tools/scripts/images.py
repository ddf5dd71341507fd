"""Images in the place of data sets that torchvision would download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from kfc_fx.tools.data.sets import DataSet, ImageSet, load, shuffled
from kfc_fx.tools.failures import import_extra

MNIST_SIDE = 28
CIFAR_SIDE = 32
PHOTOGRAPH_SIDE = 288
PHOTOGRAPHS = {"train": 200, "test": 100}
"""As many as BSDS300 has."""

Transform = Callable[[Any], Any]


class Images(Dataset[Any]):
    """Pairs of a PIL image and its class, each through the transforms of the script."""

    def __init__(
        self, images: ImageSet, transform: Transform | None, target_transform: Transform | None
    ) -> None:
        self._images, self._transform, self._target = images, transform, target_transform
        self._pil = import_extra("PIL.Image", "a data set of images")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        pixels = self._images.images[index]
        array = (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()
        image, label = self._pil.fromarray(array), int(self._images.labels[index])
        return (
            self._transform(image) if self._transform else image,
            self._target(label) if self._target else label,
        )


def put_mnist(folder: Path, data_dir: Path | None) -> str:
    """``torchvision.datasets.MNIST`` reads the files of the user, or upscaled digits."""
    data = _set("mnist", data_dir, ("mnist_train.npz", "MNIST", "raw"), MNIST_SIDE, channels=1)
    _put("MNIST", data)
    return data.title


def put_cifar10(folder: Path, data_dir: Path | None) -> str:
    """``torchvision.datasets.CIFAR10`` reads the files of the user, or upscaled digits."""
    data = _cifar(data_dir)
    _put("CIFAR10", data)
    return data.title


def put_image_folder(folder: Path, data_dir: Path | None) -> str:
    """``torchvision.datasets.ImageFolder`` gives small images, which its transforms enlarge."""
    data = _cifar(data_dir)

    def image_folder(root: str, transform: Transform | None = None, **_: Any) -> Images:
        return Images(data.train if Path(root).name == "train" else data.test, transform, None)

    _replace("ImageFolder", image_folder)
    return f"{data.title}, enlarged"


def put_photographs(folder: Path, data_dir: Path | None) -> str:
    """Crops of the photographs of scikit-learn, in the folders of BSDS300."""
    image = import_extra("PIL.Image", "a data set of images")
    whole = import_extra("sklearn.datasets", "a set of photographs").load_sample_images().images
    random = torch.Generator().manual_seed(0)
    for part, count in PHOTOGRAPHS.items():
        place = folder / "dataset" / "BSDS300" / "images" / part
        place.mkdir(parents=True)
        for number in range(count):
            pixels = whole[number % len(whole)]
            top, left = (
                int(torch.randint(size - PHOTOGRAPH_SIDE, (1,), generator=random))
                for size in pixels.shape[:2]
            )
            crop = pixels[top : top + PHOTOGRAPH_SIDE, left : left + PHOTOGRAPH_SIDE]
            image.fromarray(crop).save(place / f"{number:03}.png")
    return "crops of two photographs"


def _cifar(data_dir: Path | None) -> DataSet:
    files = ("cifar10_jpeg_train.npz", "cifar-10-batches-py", "data_batch_1")
    return _set("cifar10", data_dir, files, CIFAR_SIDE, channels=3)


def _set(
    name: str, data_dir: Path | None, files: tuple[str, ...], side: int, channels: int
) -> DataSet:
    """The set of that name where its files are in the folder, else digits of its size."""
    if data_dir is not None and any((data_dir / file).exists() for file in files):
        return shuffled(load(name, data_dir), seed=0)
    digits = shuffled(load("digits"), seed=0)

    def upscaled(part: ImageSet) -> ImageSet:
        large = F.interpolate(part.images.float(), side, mode="bilinear")
        return ImageSet(large.to(torch.uint8).expand(-1, channels, -1, -1), part.labels)

    return DataSet(name, "digits, upscaled", upscaled(digits.train), upscaled(digits.test))


def _put(name: str, data: DataSet) -> None:
    """In the place of a class of torchvision, with its arguments."""

    def made(
        root: str,
        train: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> Images:
        return Images(data.train if train else data.test, transform, target_transform)

    _replace(name, made)


def _replace(name: str, made: Callable[..., Images]) -> None:
    """A class of torchvision by a function, in every module that shows it from here on."""
    setattr(import_extra("torchvision.datasets", "a data set of images"), name, made)
