"""The image data sets of ``kfc-fx train``, by name, from the layouts they are kept in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kfc_fx.tools.data.files import Arrays, read_cifar_batches, read_idx_pair, read_npz
from kfc_fx.tools.failures import CommandError, did_you_mean, import_extra, unknown_name

DEFAULT_FOLDER = Path("data")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TEST_SIZE = 360
DIGITS_LEVELS = 16


@dataclass(frozen=True)
class ImageSet:
    """``images`` uint8 ``[N, C, H, W]``, ``labels`` int64 ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> ImageSet:
        """The examples at the indices ``rows``, in that order."""
        return ImageSet(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class DataSet:
    """A training and a test set of the same kind.

    ``title`` is what a figure from it should be quoted as; ``image_shape`` is (C, H, W).
    """

    name: str
    title: str
    train: ImageSet
    test: ImageSet

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        return int(max(self.train.labels.max(), self.test.labels.max())) + 1


def load(name: str, folder: Path | None = None) -> DataSet:
    """Read a data set; nothing is downloaded.

    Args:
        name: one of :data:`DATA_SETS`.
        folder: where its files are: the folder itself, or the one that torchvision is given as
            ``root``, or one with ``<name>_train.npz`` and ``<name>_test.npz``. ``digits`` needs
            none. Without one, ``data`` (and for Fashion-MNIST Debian's folder) is looked in.

    Raises:
        CommandError: no such data set or folder, no files of it there, or damaged files.
    """
    if name not in DATA_SETS:
        raise unknown_name("data set", name, DATA_SETS)
    if folder is not None and not folder.is_dir():
        raise _no_such_folder(folder)
    return DATA_SETS[name](folder)


def shuffled(data: DataSet, seed: int, train_size: int | None = None) -> DataSet:
    """The data set with its training examples shuffled, cut to the first ``train_size``.

    Raises:
        CommandError: there are fewer training examples.
    """
    available = len(data.train)
    if train_size is not None and not 0 < train_size <= available:
        raise CommandError(
            f"--train-size {train_size}: {data.name} has 1 to {available} training examples"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return replace(data, train=data.train.take(order[:train_size]))


def _load_digits(folder: Path | None) -> DataSet:
    datasets = import_extra("sklearn.datasets", "the data set 'digits'")
    selection = import_extra("sklearn.model_selection", "the data set 'digits'")
    if folder is not None:
        raise CommandError("digits comes with scikit-learn: leave out --data-dir, or name --data")
    images, labels = datasets.load_digits(return_X_y=True)
    # The split has a seed of its own: runs that differ in theirs share the test set.
    train_x, test_x, train_y, test_y = selection.train_test_split(
        images.reshape(-1, 1, 8, 8) * (255 // DIGITS_LEVELS),
        labels,
        test_size=DIGITS_TEST_SIZE,
        stratify=labels,
        random_state=0,
    )
    train = _image_set((train_x.astype("uint8"), train_y))
    return DataSet("digits", "digits", train, _image_set((test_x.astype("uint8"), test_y)))


def _load_mnist(folder: Path | None) -> DataSet:
    folder = folder or DEFAULT_FOLDER
    return (
        _from_npz("mnist", "MNIST", folder, "mnist")
        or _from_idx("mnist", "MNIST", [folder / "MNIST" / "raw", folder / "raw", folder])
        or _nothing_found("MNIST", folder, "mnist_train.npz", "MNIST/raw/train-images-idx3-ubyte")
    )


def _load_fashion_mnist(folder: Path | None) -> DataSet:
    root = folder or DEFAULT_FOLDER
    places = [root / "FashionMNIST" / "raw", root / "raw", root]
    if folder is None:
        places.append(DEBIAN_FASHION_MNIST)
    return (
        _from_npz("fashion-mnist", "Fashion-MNIST", root, "fashion_mnist")
        or _from_idx("fashion-mnist", "Fashion-MNIST", places)
        or _nothing_found(
            "Fashion-MNIST",
            root,
            "FashionMNIST/raw/train-images-idx3-ubyte",
            "fashion_mnist_train.npz",
            hint="; Debian's package dataset-fashion-mnist has them",
        )
    )


def _load_cifar10(folder: Path | None) -> DataSet:
    folder = folder or DEFAULT_FOLDER
    return (
        _from_cifar_batches([folder / "cifar-10-batches-py", folder])
        or _from_npz("cifar10", "CIFAR-10 (JPEG q75)", folder, "cifar10_jpeg")
        or _nothing_found(
            "CIFAR-10", folder, "cifar-10-batches-py/data_batch_1", "cifar10_jpeg_train.npz"
        )
    )


DATA_SETS: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion-mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
}


def _from_npz(name: str, title: str, folder: Path, stem: str) -> DataSet | None:
    paths = [folder / f"{stem}_{part}.npz" for part in ("train", "test")]
    if not all(path.is_file() for path in paths):
        return None
    train, test = (_image_set(read_npz(path)) for path in paths)
    return DataSet(name, title, train, test)


def _from_idx(name: str, title: str, folders: list[Path]) -> DataSet | None:
    for folder in folders:
        paths = [
            _plain_or_gzip(folder / f"{part}-{kind}-ubyte")
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ]
        found = [path for path in paths if path is not None]
        if len(found) == len(paths):
            train, test = (_image_set(read_idx_pair(*pair)) for pair in (found[:2], found[2:]))
            return DataSet(name, title, train, test)
    return None


def _from_cifar_batches(folders: list[Path]) -> DataSet | None:
    for folder in folders:
        train_paths = [folder / f"data_batch_{number}" for number in range(1, 6)]
        test_path = folder / "test_batch"
        if all(path.is_file() for path in [*train_paths, test_path]):
            train = _image_set(read_cifar_batches(train_paths))
            return DataSet(
                "cifar10", "CIFAR-10", train, _image_set(read_cifar_batches([test_path]))
            )
    return None


def _plain_or_gzip(path: Path) -> Path | None:
    candidates = [path, path.with_name(f"{path.name}.gz")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _image_set(arrays: Arrays) -> ImageSet:
    images, labels = arrays
    # A copy, because an idx file's array is a read-only view of its bytes.
    return ImageSet(torch.tensor(images), torch.tensor(labels))


def _no_such_folder(folder: Path) -> CommandError:
    if folder.exists():
        return CommandError(f"{folder} is not a folder")
    siblings = [path.name for path in folder.parent.glob("*") if path.is_dir()]
    return CommandError(f"no folder {folder}{did_you_mean(folder.name, siblings)}")


def _nothing_found(title: str, folder: Path, *expected: str, hint: str = "") -> DataSet:
    raise CommandError(
        f"no {title} files in {folder}: looked for {' or '.join(expected)} "
        f"(name their folder by --data-dir){hint}"
    )
