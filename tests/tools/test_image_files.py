from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kfc_fx.tools.data.files import read_cifar_batches, read_idx_pair, read_npz
from kfc_fx.tools.failures import CommandError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (3, 5, 4), dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def jpeg_bytes(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_jpeg_npz(path: Path, images: list[np.ndarray], labels: list[int]) -> None:
    files = [jpeg_bytes(image) for image in images]
    blob = np.frombuffer(b"".join(files), np.uint8)
    lengths = np.array([len(file) for file in files], np.int32)
    np.savez(path, blob=blob, n=lengths, y=np.array(labels, np.uint8))


def test_npz_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=GREY, y=np.array([0, 1, 2], np.uint8))
    images, labels = read_npz(tmp_path / "a.npz")
    assert images.dtype == np.uint8
    assert np.array_equal(images, GREY[:, None])
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2]


def test_npz_of_arrays_with_channels_last(tmp_path: Path) -> None:
    colour = RNG.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", X=colour, y=np.zeros(2, np.uint8))
    images, _ = read_npz(tmp_path / "a.npz")
    assert np.array_equal(images, colour.transpose(0, 3, 1, 2))


def test_npz_of_jpeg_files(tmp_path: Path) -> None:
    plain = [np.full((32, 32, 3), (red, 50, 200), np.uint8) for red in (10, 120, 240)]
    write_jpeg_npz(tmp_path / "a.npz", plain, [2, 0, 1])
    images, labels = read_npz(tmp_path / "a.npz")
    assert images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [2, 0, 1]
    expected = np.stack(plain).transpose(0, 3, 1, 2).astype(int)
    assert np.abs(images.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_plain_and_gzip(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix else bytes
    images_path, labels_path = tmp_path / f"images{suffix}", tmp_path / f"labels{suffix}"
    images_path.write_bytes(pack(idx_bytes(GREY)))
    labels_path.write_bytes(pack(idx_bytes(np.array([7, 8, 9], np.uint8))))
    images, labels = read_idx_pair(images_path, labels_path)
    assert np.array_equal(images, GREY[:, None])
    assert labels.tolist() == [7, 8, 9]


def test_cifar_batches_are_joined_in_order(tmp_path: Path) -> None:
    paths = []
    rows = RNG.integers(0, 256, (2, 2, 3072), dtype=np.uint8)
    for number, data in enumerate(rows):
        path = tmp_path / f"data_batch_{number}"
        path.write_bytes(pickle.dumps({"data": data, "labels": [number, 5]}, protocol=2))
        paths.append(path)
    images, labels = read_cifar_batches(paths)
    assert np.array_equal(images.reshape(4, 3072), rows.reshape(4, 3072))
    assert labels.tolist() == [0, 5, 1, 5]


def test_cifar_batch_of_python_2_is_read(tmp_path: Path) -> None:
    # Protocol 0 with byte strings, as the published files have: "S" opcodes, no "unicode".
    array = pickle.dumps(np.zeros((1, 3072), np.uint8), protocol=0).rstrip(b".")
    batch = b"(dS'data'\n" + array + b"sS'labels'\n(lI3\nas."
    (tmp_path / "test_batch").write_bytes(batch)
    images, labels = read_cifar_batches([tmp_path / "test_batch"])
    assert images.shape == (1, 3, 32, 32)
    assert labels.tolist() == [3]


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CommandError, match=r"test_batch: os\.system does not belong"):
        read_cifar_batches([tmp_path / "test_batch"])


def test_damaged_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK\3\4 not really")
    with pytest.raises(CommandError, match=r"cannot read .*a\.npz"):
        read_npz(path)
    np.savez(path, X=GREY)
    with pytest.raises(CommandError, match=r"a\.npz is not such a data file: it has no .*y"):
        read_npz(path)
    np.savez(path, X=GREY, y=np.zeros(2, np.uint8))
    with pytest.raises(CommandError, match=r"3 images and labels of shape \(2,\) do not match"):
        read_npz(path)
    np.savez(path, X=GREY[0], y=np.zeros(5, np.uint8))
    with pytest.raises(CommandError, match=r"array of shape \(5, 4\), not images"):
        read_npz(path)


def test_jpeg_lengths_must_add_up(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", blob=np.zeros(9, np.uint8), n=np.array([4]), y=np.array([0]))
    with pytest.raises(CommandError, match="do not add up"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", b"\0\0\x0d\1\0\0\0\1\0\0\0\0", idx_bytes(GREY)[:-1], b"\0\0\x08\3\0\0"],
    ids=["empty", "no header", "floats", "short of a byte", "short of sizes"],
)
def test_damaged_idx_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images").write_bytes(content)
    (tmp_path / "images.gz").write_bytes(gzip.compress(content)[:-9] or b"x")
    for name in ("images", "images.gz"):
        with pytest.raises(CommandError, match=f"cannot read .*{name}: "):
            read_idx_pair(tmp_path / name, tmp_path / name)
