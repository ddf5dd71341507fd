"""What a node of a captured graph says about itself: shape, dtype and source line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from torch import Tensor, fx

from kfc_fx.capture.nodes import concrete, example_of, shape_of

FRAME = re.compile(r'File "([^"]+)", line (\d+)')
NOT_THE_MODEL = ("torch/", "kfc_fx/")
"""Sources through which every capture passes, as :func:`shown_path` spells them."""


def shown_shape(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the tensor or probe that a node holds, in numbers; None for other things."""
    if "kfc_probe" in node.meta:
        return tuple(node.meta["shape"])
    shape = shape_of(node)
    return None if shape is None else tuple(map(concrete, shape))


def dtype_of(node: fx.Node) -> str | None:
    """Its dtype, as ``float32``; None for other things than tensors, and probes."""
    value = example_of(node)
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else None


def source_of(node: fx.Node) -> str:
    """``file:line`` of the model's code that made a node, or ""."""
    own = [place for place in _frames(node) if not place.startswith(NOT_THE_MODEL)]
    return own[-1] if own else ""


def target_name(node: fx.Node) -> str:
    """The target of a node as a short name: of a function, without its module."""
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def _frames(node: fx.Node) -> Iterator[str]:
    for path, line in FRAME.findall(node.meta.get("stack_trace") or ""):
        yield f"{shown_path(path)}:{line}"


@lru_cache(maxsize=1024)
def shown_path(path: str) -> str:
    """A path from where packages are installed on, or from the working directory on."""
    found = Path(path)
    entries = [Path(entry).resolve() for entry in sys.path if entry]
    installed = [entry for entry in entries if entry.name in ("site-packages", "dist-packages")]
    for root in (*installed, Path.cwd(), *entries):
        if found.is_relative_to(root):
            return found.relative_to(root).as_posix()
    return found.name
