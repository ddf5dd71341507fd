"""Find the prediction in a model's output, and put tapped tensors in place of its tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from kfc_fx.errors import OutputError

Replace = Callable[[Tensor], Tensor]


def find_prediction(output: Any) -> Tensor:
    """The tensor whose likelihood is meant.

    A tensor is itself; then ``output.logits`` or ``output["logits"]``, ``output["out"]``, and
    the first floating-point tensor of a tuple, list or dict that is no scalar (a loss).

    Raises:
        OutputError: nothing of the kind; the message says what to pass.
    """
    if _is_float(output):
        return output
    for named in (getattr(output, "logits", None), _item(output, "logits"), _item(output, "out")):
        if isinstance(named, Tensor) and _is_float(named):
            return named
    if isinstance(output, Mapping | tuple | list):
        for leaf in _leaves(output):
            if _is_float(leaf) and leaf.dim() > 0:
                return leaf
    raise OutputError(
        f"cannot find the prediction in the model's output of type {type(output).__name__}: return "
        "a floating-point tensor, a tuple, list or dict that holds one, or an object with .logits; "
        "or wrap the model in a module whose forward does"
    )


def float_tensors(output: Any) -> list[Tensor]:
    """The distinct floating-point tensors of an output, the prediction among them."""
    leaves = [leaf for leaf in _leaves(output) if _is_float(leaf)]
    return list({id(leaf): leaf for leaf in leaves}.values())


def replace_tensors(output: Any, replace: Replace) -> Any:
    """The output with each of :func:`float_tensors` replaced, of the same type as it was."""

    def replaced(leaf: Any) -> Any:
        if _is_float(leaf):
            return replace(leaf)
        entries = _entries(leaf)
        if not entries:
            return leaf
        return _with_entries(leaf, {k: replace_tensors(v, replace) for k, v in entries.items()})

    return pytree.tree_map(replaced, output)


def _leaves(output: Any) -> Iterator[Any]:
    """Leaves of pytrees, and of the containers that pytree takes for leaves."""
    for leaf in pytree.tree_leaves(output):
        entries = _entries(leaf)
        if entries:
            for value in entries.values():
                yield from _leaves(value)
        else:
            yield leaf


def _entries(leaf: Any) -> dict[Any, Any]:
    """What a container unknown to pytree holds: a mapping, a dataclass, an object with .logits."""
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.init}
    if hasattr(leaf, "logits") and hasattr(leaf, "__dict__"):
        return dict(vars(leaf))
    return {}


def _with_entries(leaf: Any, entries: dict[Any, Any]) -> Any:
    """A copy of a container with other entries under the same keys."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, Mapping | type):
        return dataclasses.replace(leaf, **entries)
    copied = copy.copy(leaf)
    for key, value in entries.items():
        if isinstance(leaf, Mapping):
            copied[key] = value
        else:
            object.__setattr__(copied, key, value)
    return copied


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _item(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else None
