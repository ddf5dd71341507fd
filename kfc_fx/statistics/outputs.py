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


def find_prediction(output: Any, path: str | None = None) -> Tensor:
    """The tensor whose likelihood is meant.

    A tensor is itself; then ``output.logits`` or ``output["logits"]``, ``output["out"]``, and
    the first floating-point tensor of a tuple, list or dict that is no scalar (a loss).

    Args:
        path: of the tensor in the output, as :func:`float_tensors` has it, where it is known.

    Raises:
        OutputError: nothing of the kind; the message says what to pass.
    """
    if path:
        return _at(output, path)
    if _is_float(output):
        return output
    for named in (getattr(output, "logits", None), _item(output, "logits"), _item(output, "out")):
        if isinstance(named, Tensor) and _is_float(named):
            return named
    if isinstance(output, Mapping | tuple | list):
        for leaf in float_tensors(output).values():
            if leaf.dim() > 0:
                return leaf
    raise OutputError(
        f"cannot find the prediction in the model's output of type {type(output).__name__}: return "
        "a floating-point tensor, a tuple, list or dict that holds one, or an object with .logits; "
        "or wrap the model in a module whose forward does"
    )


def float_tensors(output: Any) -> dict[str, Tensor]:
    """The distinct floating-point tensors of an output by their path in it, the prediction among
    them. A path is names and indices with dots between, empty for an output that is a tensor."""
    known: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for path, leaf in _leaves(output, ""):
        if _is_float(leaf) and id(leaf) not in known:
            known[id(leaf)] = path
            found[path] = leaf
    return found


def _at(output: Any, path: str) -> Tensor:
    for own, leaf in _leaves(output, ""):
        if own == path and _is_float(leaf):
            return leaf  # type: ignore[no-any-return]
    known = ", ".join(repr(own) for own in float_tensors(output)) or "none"
    raise OutputError(f"the model's output has no tensor {path!r}; its tensors are: {known}")


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


def _leaves(output: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Leaves of pytrees, and of the containers that pytree takes for leaves, with their paths."""
    entries = _entries(output)
    if entries:
        for key, value in entries.items():
            yield from _leaves(value, _joined(path, str(key)))
        return
    leaves, _ = pytree.tree_flatten_with_path(output)
    for keys, leaf in leaves:
        own = path
        for key in keys:
            own = _joined(own, _shown(key))
        if keys and _entries(leaf):
            yield from _leaves(leaf, own)
        else:
            yield own, leaf


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(key: Any) -> str:
    """A step of a pytree's path: a key, an index, or the name of a field."""
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


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
