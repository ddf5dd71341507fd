"""What a node of a captured graph says about itself: shape, dtype, module and source line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from torch import Tensor, fx

from kfc_fx.plan.locations import concrete
from kfc_fx.plan.match import module_path

FRAME = re.compile(r'File "([^"]+)", line (\d+)')
NOT_THE_MODEL = ("torch/", "kfc_fx/")
"""Sources through which every capture passes, as :func:`shown_path` spells them."""


def example_of(node: fx.Node) -> object:
    """The fake value that a node has, if it is known."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the tensor that a node holds; None for other things."""
    if "kfc_probe" in node.meta:
        return tuple(node.meta["shape"])
    value = example_of(node)
    return tuple(map(concrete, value.shape)) if isinstance(value, Tensor) else None


def dtype_of(node: fx.Node) -> str | None:
    """Its dtype, as ``float32``; None for other things than tensors, and probes."""
    value = example_of(node)
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else None


def module_of(node: fx.Node) -> tuple[str, str]:
    """Path and type name of the innermost module call around a node; empty where there is none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return module_path(path), name.rpartition(".")[2]


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
