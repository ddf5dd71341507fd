"""Send the matrix products of generated functions to the library that is fastest here."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from kfc_fx.codegen.spec import StackSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph
from kfc_fx.kernels.cpu_matmul import LEAST_WORK, matmul, onednn_is_faster


def choose_products(updates: Iterable[UpdateGraph], stacks: Sequence[StackSpec]) -> None:
    """On a CPU whose BLAS is slow, ``first @ second`` becomes ``matmul(first, second)``, if a layer
    is wide enough for that to matter."""
    if not any(map(_is_wide, stacks)) or not onednn_is_faster():
        return
    for update in updates:
        _replace_products(update)


def _replace_products(update: UpdateGraph) -> None:
    for node in update.graph.nodes:
        if node.target is operator.matmul:
            node.target = matmul
    for inner in update.functions:
        _replace_products(inner)


def _is_wide(stack: StackSpec) -> bool:
    """Whether products of its matrices on a CPU are worth another library."""
    _, rows, columns = stack.matrix_shape
    return stack.device == "cpu" and 2 * rows * columns * max(rows, columns) >= LEAST_WORK
