"""What the zoo says of a model: how to build it, at what reduced size, and how it was checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ModelCase:
    """A model with random weights, in training mode, and the arguments of one call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    likelihood: str = "categorical"
    size: str = ""
    """What was reduced, for the report."""


@dataclass(frozen=True)
class ZooEntry:
    """One row of the zoo: where the model comes from and a function that builds its case."""

    library: str
    family: str
    name: str
    build: Callable[[], ModelCase]

    @property
    def path(self) -> str:
        """``library/family/name``, by which rows are chosen and found again."""
        return f"{self.library}/{self.family}/{self.name}"


def smallest_image_case(
    build: Callable[[int], nn.Module], sizes: tuple[int, ...], likelihood: str = "categorical"
) -> ModelCase:
    """The case of an image classifier at the first of ``sizes`` that it takes.

    Args:
        build: from the side of the image to the model; called once per size that is tried.
        sizes: sides in pixels, in the order in which they are tried.

    Raises:
        RuntimeError: the error at the last size, if the model takes none.
    """
    problems = []
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        try:
            model = build(size).train()
            with _buffers_kept(model), torch.no_grad():
                model(images)
        except Exception as error:
            problems.append(f"{size}: {error}")
            continue
        return ModelCase(model, (images,), likelihood=likelihood, size=f"{size}x{size}")
    raise RuntimeError(f"takes none of the sizes {sizes}; {problems[-1]}")


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
