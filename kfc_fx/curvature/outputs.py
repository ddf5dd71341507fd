"""Find the prediction in a model's output, and put tapped tensors in place of its tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from kfc_fx.errors import OutputError


def find_prediction(output: Any) -> Tensor:
    """The tensor whose likelihood is meant.

    A tensor is itself; then ``output.logits`` or ``output["logits"]``, ``output["out"]``, and
    the first floating-point tensor of a tuple, list or dict.

    Raises:
        OutputError: nothing of the kind; the message says what to pass.
    """
    if _is_float(output):
        return output
    for named in (_attribute(output, "logits"), _item(output, "logits"), _item(output, "out")):
        if _is_float(named):
            return named
    if isinstance(output, Mapping | tuple | list):
        for leaf in pytree.tree_leaves(output):
            if _is_float(leaf):
                return leaf
    raise OutputError(
        f"cannot find the prediction in the model's output of type {type(output).__name__}: return "
        "a floating-point tensor, a tuple, list or dict that holds one, or an object with .logits; "
        "or wrap the model in a module whose forward does"
    )


def float_tensors(output: Any) -> list[Tensor]:
    """The distinct floating-point tensors of an output, the prediction among them."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if _is_float(leaf)]
    leaves.append(find_prediction(output))
    return list({id(leaf): leaf for leaf in leaves}.values())


def replace_tensors(output: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """The output with each of :func:`float_tensors` replaced, of the same type as it was."""
    mapped = pytree.tree_map(lambda leaf: replace(leaf) if _is_float(leaf) else leaf, output)
    if mapped is output and not isinstance(output, Tensor):  # an opaque object with .logits
        mapped = copy.copy(output)
        mapped.logits = replace(output.logits)
    return mapped


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _attribute(output: Any, name: str) -> Any:
    return getattr(output, name, None)


def _item(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else None
