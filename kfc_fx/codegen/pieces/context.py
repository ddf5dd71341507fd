"""What the generators of one function share: its graph, its arguments, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value


@dataclass
class Context:
    """A function that is being generated."""

    update: UpdateGraph
    spec: UpdateSpec
    arguments: dict[str, Value]
    result: dict[str, Value] = field(default_factory=dict)
    """New state by name: what the function returns."""
    together: dict[str, tuple[Value, Value]] = field(default_factory=dict)
    """Decompositions that were made for several stacks at once, and what failed, by state key."""

    def state(self, name: str, stack: StackSpec) -> Value:
        """A state tensor of a stack."""
        return self.arguments["state"][f"{name}_{stack.key}"]

    def option(self, name: str, stack: StackSpec) -> Value:
        """An option of the stack's scaling."""
        return self.arguments[self.spec.option(name, stack.scaling)]

    def has_momentum(self, stack: StackSpec) -> bool:
        """Whether the blocks of a stack keep a momentum."""
        return stack.scaling in self.spec.momentum

    def steps_ahead(self, stack: StackSpec) -> bool:
        """Whether the momentum of a stack takes Nesterov's step ahead."""
        return stack.scaling in self.spec.nesterov

    def states(self, name: str, stacks: Sequence[StackSpec]) -> list[Value]:
        """A state tensor of each of several stacks."""
        return [self.state(name, stack) for stack in stacks]

    def keep(self, name: str, stacks: Sequence[StackSpec], new: Value) -> Value:
        """Name a list of new state tensors shaped like the gradients, and return them from the
        function; blocks that have no gradient in this step keep the old ones."""
        if self.spec.partial:
            found = self.update.let_list(f"new_{name}", new)
            old = self.states(name, stacks)
            kept = []
            for i, stack in enumerate(stacks):
                active = self.arguments["active"][stack.key]
                kept.append(self.update.call(torch.where, active, found[i], old[i]))
            new = self.update.call(list, tuple(kept))
        new = self.update.let_list(name, new)
        for i, stack in enumerate(stacks):
            self.result[f"{name}_{stack.key}"] = new[i]
        return new

    def step(self, stack: StackSpec, step: Value) -> Value:
        """Name the step of a stack, zero for blocks that have no gradient."""
        if self.spec.partial:
            step = step * self.arguments["active"][stack.key]
        return self.update.let(f"step_{stack.key}", step, stack.matrix_shape)
