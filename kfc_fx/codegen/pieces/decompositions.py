"""Decompositions of factors: stack by stack, or on a GPU those of one side together.

A GPU decomposes a few small matrices in the time of the launches that it takes: one call for all
factors of a side, whatever stacks they are of, has a fraction of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.spec import StackSpec
from kfc_fx.codegen.text.update_graph import Value

DEVICES = ("cuda",)
"""Where factors of one side are decomposed together."""

WIDEST = 1024
"""Side up to which they are; products of wider ones take longer than launches, and room."""


@dataclass(frozen=True)
class Decomposition:
    """A call that turns a factor ``[entries, D, D]`` into a matrix of its shape, and says where it
    failed, ``[entries]``."""

    stack: StackSpec
    factor: str
    name: str
    """Of the result in the state, without the stack's key."""
    function: Callable[..., Any]
    tensors: tuple[Value, ...]
    """Arguments that have as many entries as the factor, which is the first."""
    number: Value | None = None
    """An argument after them that all have in common, and what it is called."""
    number_name: str = ""

    @property
    def key(self) -> str:
        """Of the result in the state."""
        return f"{self.name}_{self.stack.key}"

    @property
    def side(self) -> int:
        """D."""
        return self.stack.factor_shapes[self.factor][-1]

    @property
    def entries(self) -> int:
        """Matrices: one for each entry of the stack, or one for each part of it."""
        return self.stack.factor_shapes[self.factor][0]

    def call(self, context: Context, tensors: Sequence[Value]) -> Value:
        """The call on these tensors instead of its own."""
        numbers = [] if self.number is None else [self.number]
        return context.update.call(self.function, *tensors, *numbers)


def decompose_together(context: Context, wanted: Sequence[Decomposition]) -> None:
    """Make the calls that are to be made together; :func:`decomposed` finds their results."""
    groups: dict[object, list[Decomposition]] = {}
    for each in wanted:
        if each.stack.device.split(":")[0] in DEVICES and each.side <= WIDEST:
            place = (each.stack.device, each.stack.dtype)
            groups.setdefault((place, each.side, each.function, each.number_name), []).append(each)
    update, names = context.update, set[str]()
    for group in groups.values():
        if len(group) == 1:
            continue
        first, depths = group[0], [each.entries for each in group]
        label = f"{first.name.split('_')[0]}_{first.side}"
        while label in names:
            label += "_again"
        names.add(label)
        update.section(f"{len(group)} factors of side {first.side}, {sum(depths)} matrices")
        columns = zip(*(each.tensors for each in group), strict=True)
        joined = [update.call(torch.cat, list(column)) for column in columns]
        both = update.let_tuple((label, f"failed_{label}"), first.call(context, joined))
        parts = [update.let(f"{v.node.name}_parts", v.split(depths)) for v in both]
        for number, each in enumerate(group):
            context.together[each.key] = (parts[0][number], parts[1][number])


def decomposed(context: Context, wanted: Decomposition) -> tuple[Value, Value]:
    """The result and what failed, both named."""
    update, names = context.update, (wanted.key, f"failed_{wanted.factor}_{wanted.stack.key}")
    if wanted.key in context.together:
        value, failed = context.together[wanted.key]
        shape = wanted.stack.factor_shapes[wanted.factor]
        return update.let(names[0], value, shape), update.let(names[1], failed)
    found, failed = update.let_tuple(names, wanted.call(context, wanted.tensors))
    return found, failed
