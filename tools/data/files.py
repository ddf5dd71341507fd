"""Readers of the files that image data sets come in: npz, idx, and CIFAR's python batches.

Every reader returns ``(images, labels)`` as uint8 ``[N, C, H, W]`` and int64 ``[N]`` arrays,
and raises :class:`~kfc_fx.tools.failures.CommandError`, naming the file, where one is damaged.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfc_fx.tools.failures import CommandError, import_extra

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

IDX_UINT8 = 8
CIFAR_SHAPE = (3, 32, 32)


def read_npz(path: Path) -> Arrays:
    """An npz file with ``y`` and either ``X`` or, for JPEG images, ``blob`` and ``n``.

    ``X`` is uint8 ``[N, H, W]`` or ``[N, H, W, C]``; ``blob`` the bytes of all JPEG files
    joined, ``n`` their lengths.
    """
    # NumPy leaves a file that it has opened itself open where it is damaged.
    with (
        _damage_named(path),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        labels = arrays["y"]
        images = _decode_images(arrays["blob"], arrays["n"]) if "blob" in arrays else arrays["X"]
    return _checked(path, _channels_first(path, images), labels)


def read_idx_pair(images_path: Path, labels_path: Path) -> Arrays:
    """MNIST's format: one idx file of images ``[N, H, W]``, one of labels; ``.gz`` or not."""
    images = _read_idx(images_path)
    return _checked(images_path, _channels_first(images_path, images), _read_idx(labels_path))


def read_cifar_batches(paths: Sequence[Path]) -> Arrays:
    """CIFAR-10's python version: pickled dicts with ``data`` ``[n, 3072]`` and ``labels``."""
    batches = [_read_cifar_batch(path) for path in paths]
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _decode_images(blob: NDArray[np.uint8], lengths: NDArray[np.int32]) -> NDArray[np.uint8]:
    pillow = import_extra("PIL.Image", "reading JPEG images")
    ends = np.cumsum(lengths, dtype=np.int64)
    if not len(ends) or ends[-1] != len(blob):
        raise ValueError("the lengths in 'n' do not add up to the length of 'blob'")
    joined = memoryview(blob.tobytes())
    files = (
        joined[start:end] for start, end in zip(ends - lengths.astype(np.int64), ends, strict=True)
    )
    return np.stack([np.asarray(pillow.open(io.BytesIO(file)).convert("RGB")) for file in files])


def _read_idx(path: Path) -> NDArray[np.uint8]:
    with _damage_named(path):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        zeros, kind, rank = content[:2], content[2], content[3]
        if zeros != b"\0\0" or kind != IDX_UINT8:
            raise ValueError("not an idx file of unsigned bytes")
        shape = np.frombuffer(content, ">u4", count=rank, offset=4).astype(np.int64)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(*shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers only, so that data cannot run code."""

    allowed = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("numpy", "_codecs") and name in self.allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a data file")


def _read_cifar_batch(path: Path) -> Arrays:
    with _damage_named(path), path.open("rb") as file:
        batch = _ArrayUnpickler(file, encoding="latin1").load()
        images = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, *CIFAR_SHAPE)
        labels = np.asarray(batch["labels"])
    return _checked(path, images, labels)


def _channels_first(path: Path, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise CommandError(f"{path} holds an array of shape {images.shape}, not images")


def _checked(path: Path, images: NDArray[np.uint8], labels: NDArray[Any]) -> Arrays:
    if labels.shape != (len(images),) or not len(images):
        raise CommandError(
            f"{path}: {len(images)} images and labels of shape {labels.shape} do not match"
        )
    return images, labels.astype(np.int64)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise CommandError(f"{path} is not such a data file: it has no {error}") from error
    except (
        AttributeError,  # a pickle of something else than a dict
        EOFError,
        IndexError,
        OSError,  # unreadable, not gzip, not an image
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise CommandError(f"cannot read {path}: {error}") from error
