"""Send the matrix products of generated functions to the library that is fastest here."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from kfc_fx.codegen.update_graph import UpdateGraph
from kfc_fx.kernels.cpu_matmul import matmul, onednn_is_faster


def choose_products(updates: Sequence[UpdateGraph], devices: Sequence[str]) -> None:
    """On a CPU whose BLAS is slow, ``first @ second`` becomes ``matmul(first, second)``."""
    if "cpu" not in devices or not onednn_is_faster():
        return
    for update in updates:
        for node in update.graph.nodes:
            if node.target is operator.matmul:
                node.target = matmul
