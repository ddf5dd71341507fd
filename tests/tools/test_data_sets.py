from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kfc_fx.tools.data import sets as data_sets
from kfc_fx.tools.data.files import read_npz
from kfc_fx.tools.data.sets import DataSet, load, shuffled
from kfc_fx.tools.failures import CommandError


def write_idx(folder: Path, suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, size in (("train", 6), ("t10k", 3)):
        labels = np.arange(size, dtype=np.uint8)
        images = np.broadcast_to(labels[:, None, None], (size, 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = header + array.tobytes()
            path = folder / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))


def check(data: DataSet, title: str, shape: tuple[int, int, int], sizes: tuple[int, int]) -> None:
    assert data.title == title
    assert data.image_shape == shape
    assert (len(data.train), len(data.test)) == sizes
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64


def test_digits_come_with_scikit_learn() -> None:
    data = load("digits")
    check(data, "digits", (1, 8, 8), (1437, 360))
    assert data.classes == 10
    assert int(data.train.images.max()) == 240
    assert torch.equal(load("digits").test.images, data.test.images)


@pytest.mark.parametrize("place", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_in_torchvision_layout(tmp_path: Path, place: str, suffix: str) -> None:
    write_idx(tmp_path / place, suffix)
    data = load("mnist", tmp_path)
    check(data, "MNIST", (1, 28, 28), (6, 3))
    assert torch.equal(data.train.images[:, 0, 0, 0].long(), data.train.labels)


def test_fashion_mnist_in_torchvision_layout(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw")
    check(load("fashion-mnist", tmp_path), "Fashion-MNIST", (1, 28, 28), (6, 3))


def test_fashion_mnist_where_debian_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path / "share", ".gz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_sets, "DEBIAN_FASHION_MNIST", tmp_path / "share")
    check(load("fashion-mnist"), "Fashion-MNIST", (1, 28, 28), (6, 3))
    check(load("fashion-mnist", tmp_path / "share"), "Fashion-MNIST", (1, 28, 28), (6, 3))


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "."])
def test_cifar10_in_torchvision_layout(tmp_path: Path, place: str) -> None:
    write_cifar(tmp_path / place)
    check(load("cifar10", tmp_path), "CIFAR-10", (3, 32, 32), (10, 2))


def test_npz_files(tmp_path: Path) -> None:
    for part, size in (("train", 4), ("test", 2)):
        images = np.zeros((size, 28, 28), np.uint8)
        np.savez(tmp_path / f"mnist_{part}.npz", X=images, y=np.arange(size))
    check(load("mnist", tmp_path), "MNIST", (1, 28, 28), (4, 2))


def test_data_beside_the_working_directory_needs_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert len(load("mnist").train) == 6


def test_lossy_cifar10_is_called_so(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "JPEG")
    blob = np.frombuffer(file.getvalue() * 2, np.uint8)
    for part in ("train", "test"):
        lengths = np.full(2, len(blob) // 2, np.int32)
        np.savez(tmp_path / f"cifar10_jpeg_{part}.npz", blob=blob, n=lengths, y=np.arange(2))
    check(load("cifar10", tmp_path), "CIFAR-10 (JPEG q75)", (3, 32, 32), (2, 2))


def test_real_images(real_data: Path) -> None:
    images, labels = read_npz(real_data / "cifar10_jpeg_test.npz")
    assert images.shape == (10_000, 3, 32, 32)
    assert np.bincount(labels).tolist() == [1000] * 10


def test_rows_sorted_by_class_are_shuffled(two_class_data: DataSet) -> None:
    by_class = two_class_data.train.take(two_class_data.train.labels.argsort(stable=True))
    data = DataSet("sorted", "sorted", by_class, two_class_data.test)
    mixed = shuffled(data, seed=0)
    assert 0 < int(mixed.train.labels[:20].sum()) < 20
    assert torch.equal(mixed.train.labels.sort().values, by_class.labels)
    means = mixed.train.images.float().mean((1, 2, 3))
    assert torch.equal((means > 100).long(), mixed.train.labels)
    assert torch.equal(mixed.test.images, data.test.images)
    assert torch.equal(shuffled(data, 0).train.labels, mixed.train.labels)
    assert not torch.equal(shuffled(data, 1).train.images, mixed.train.images)


def test_train_size_takes_the_first_of_the_shuffled(two_class_data: DataSet) -> None:
    whole, part = shuffled(two_class_data, 3), shuffled(two_class_data, 3, 7)
    assert torch.equal(part.train.images, whole.train.images[:7])
    for size in (0, -1, 41):
        with pytest.raises(CommandError, match=f"--train-size {size}: bright has 1 to 40"):
            shuffled(two_class_data, 3, size)


def test_wrong_names_and_folders(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"'cifar-10' \(did you mean 'cifar10'\?\); there are"):
        load("cifar-10")
    with pytest.raises(CommandError, match=r"no folder .*imags \(did you mean 'images'\?\)"):
        load("mnist", tmp_path / "imags")
    with pytest.raises(CommandError, match="file is not a folder"):
        load("mnist", tmp_path / "file")
    with pytest.raises(CommandError, match="leave out --data-dir"):
        load("digits", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_folder_without_the_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(CommandError, match=rf"files in {tmp_path}: looked for .*\.npz"):
        load(name, tmp_path)


def test_half_a_data_set_is_none(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(CommandError, match="no MNIST files"):
        load("mnist", tmp_path)
