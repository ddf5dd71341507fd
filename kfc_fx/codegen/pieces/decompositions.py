"""Decompositions of factors: stack by stack, or on a GPU those of one side together.

A GPU decomposes a few small matrices in the time of the launches that it takes: one call for all
factors of a side, whatever stacks they are of, has a fraction of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.spec import StackSpec, counted
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value

DEVICES = ("cuda",)
"""Where factors of one side are decomposed together."""

WIDEST = 1024
"""Side up to which they are; products of wider ones take longer than launches, and room."""

Made = Mapping[tuple[str, str], tuple[Value, Value]]
"""Key of a stack and name in its state, to a decomposition that was made together with others and
where it failed."""


@dataclass(frozen=True)
class Decomposition:
    """A call that turns a factor ``[entries, D, D]`` into a matrix of its shape, and says where it
    failed, ``[entries]``."""

    stack: StackSpec
    factor: str
    name: str
    """Of the result in the state."""
    function: Callable[..., Any]
    tensors: tuple[str, ...]
    """State that it takes, the factor first, of as many entries."""
    damping: float | None = None
    """The power of the damping that it takes after them, if it does."""
    follows: bool = False
    """Whether it goes on from its last result, but at the first refresh."""

    @property
    def side(self) -> int:
        """D."""
        return self.stack.factor_shapes[self.factor][-1]

    @property
    def entries(self) -> int:
        """Matrices: one for each entry of the stack, or one for each part of it."""
        return self.stack.factor_shapes[self.factor][0]

    def call(
        self, update: UpdateGraph, tensors: Sequence[Value], arguments: Mapping[str, Value]
    ) -> Value:
        """The call on these tensors.

        Args:
            arguments: has ``damping`` and ``first``, where it takes them.
        """
        numbers = []
        if self.damping is not None:
            damping = arguments["damping"]
            numbers = [damping if self.damping == 1 else damping**self.damping]
        more = {"first": arguments["first"]} if self.follows else {}
        return update.call(self.function, *tensors, *numbers, **more)


def decompose_together(context: Context, wanted: Sequence[Decomposition]) -> Made:
    """Make the calls that are to be made together."""
    groups: dict[object, list[Decomposition]] = {}
    for each in wanted:
        if each.stack.device.split(":")[0] in DEVICES and each.side <= WIDEST:
            place = (each.stack.device, each.stack.dtype)
            key = (place, each.side, each.function, each.damping, each.stack.scaling)
            groups.setdefault(key, []).append(each)
    made: dict[tuple[str, str], tuple[Value, Value]] = {}
    names = set[str]()
    for group in groups.values():
        if len(group) > 1:
            label = f"{group[0].name.split('_')[0]}_{group[0].side}"
            while label in names:
                label += "_again"
            names.add(label)
            made |= _made(context, group, label)
    return made


def _made(
    context: Context, group: Sequence[Decomposition], label: str
) -> dict[tuple[str, str], tuple[Value, Value]]:
    update, first = context.update, group[0]
    depths = [each.entries for each in group]
    matrices = "1 matrix" if sum(depths) == 1 else f"{sum(depths)} matrices"
    update.section(f"{counted(len(group), 'factor')} of side {first.side}, {matrices}")
    columns = zip(*(context_tensors(context, each) for each in group), strict=True)
    joined = [update.call(torch.cat, list(column)) for column in columns]
    arguments = dict(context.arguments)
    if first.damping is not None:
        arguments["damping"] = context.option("damping", first.stack)
    both = update.let_tuple((label, f"failed_{label}"), first.call(update, joined, arguments))
    parts = [update.let(f"{v.node.name}_parts", v.split(depths)) for v in both]
    return {
        (each.stack.key, each.name): (parts[0][number], parts[1][number])
        for number, each in enumerate(group)
    }


def context_tensors(context: Context, wanted: Decomposition) -> list[Value]:
    """What a decomposition takes, of the state of its stack."""
    return [context.state(name, wanted.stack) for name in wanted.tensors]


def decomposed(local: StackContext, wanted: Decomposition, made: Made) -> tuple[Value, Value]:
    """The result and what failed, both named; ``made`` has those that are arguments already."""
    found = made.get((wanted.stack.key, wanted.name))
    if found is not None:
        return local.arguments[wanted.name], local.arguments[f"failed_{wanted.factor}"]
    tensors = [local.state(name) for name in wanted.tensors]
    call = wanted.call(local.update, tensors, local.arguments)
    result, failed = local.update.let_tuple((wanted.name, f"failed_{wanted.factor}"), call)
    return result, failed
