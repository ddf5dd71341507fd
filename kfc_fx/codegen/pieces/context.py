"""What the generators of one function share: its graph, its arguments, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kfc_fx.codegen.spec import ScalingSpec, StackSpec, UpdateSpec, describe
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value, entries_at, values_at
from kfc_fx.linalg.lists import where_active


@dataclass(frozen=True)
class StackContext:
    """A function within another, of one stack, that is being generated."""

    update: UpdateGraph
    spec: UpdateSpec
    stack: StackSpec
    arguments: Mapping[str, Value]

    def state(self, name: str) -> Value:
        """A state tensor of the stack."""
        return self.arguments["state"][name]

    def let(self, name: str, value: Value) -> Value:
        """Name a value that has the shape of the gradient."""
        return self.update.let(name, value, self.stack.matrix_shape)


@dataclass
class Context:
    """A function that is being generated."""

    update: UpdateGraph
    spec: UpdateSpec
    arguments: dict[str, Value]
    result: dict[str, dict[str, Value]] = field(default_factory=dict)
    """New state by stack and name: what the function returns."""
    keys: dict[str, Value] = field(default_factory=dict)
    """Names of stacks that were listed so far."""

    def state(self, name: str, stack: StackSpec) -> Value:
        """A state tensor of a stack."""
        return self.arguments["state"][stack.key][name]

    def states(self, name: str, stacks: Sequence[StackSpec]) -> Value:
        """A state tensor of each of the stacks of a scaling, a list."""
        if len(stacks) == 1:
            return [self.state(name, stacks[0])]
        return self.update.call(entries_at, self.arguments["state"], self._keys(stacks), name)

    def each(self, argument: str, stacks: Sequence[StackSpec]) -> Value:
        """The entry of an argument for each of the stacks of a scaling, a list."""
        if len(stacks) == 1:
            return [self.arguments[argument][stacks[0].key]]
        return self.update.call(values_at, self.arguments[argument], self._keys(stacks))

    def _keys(self, stacks: Sequence[StackSpec]) -> Value:
        """The names of the stacks of a scaling."""
        name = self.name("stacks", stacks[0].scaling)
        if name not in self.keys:
            keys = self.update.call(tuple, tuple(stack.key for stack in stacks))
            self.keys[name] = self.update.let(name, keys)
        return self.keys[name]

    def option(self, name: str, stack: StackSpec) -> Value:
        """An option of the stack's scaling."""
        return self.arguments[self.spec.option(name, stack.scaling)]

    def momentum(self, stacks: Sequence[StackSpec]) -> Value:
        """The momentum that stacks of one scaling share, or the list of their own."""
        scaling = stacks[0].scaling
        if not self.spec.has_own_momenta(scaling):
            return self.option("momentum", stacks[0])
        own = self.each("momentum", stacks)
        own = self.update.call(list, tuple(own)) if isinstance(own, list) else own
        return self.update.let(self.name("momenta", scaling), own)

    def has_momentum(self, stack: StackSpec) -> bool:
        """Whether the blocks of a stack keep a momentum."""
        return stack.scaling in self.spec.momentum

    def steps_ahead(self, stack: StackSpec) -> bool:
        """Whether the momentum of a stack takes Nesterov's step ahead."""
        return stack.scaling in self.spec.nesterov

    def name(self, word: str, scaling: ScalingSpec) -> str:
        """A name for something of all stacks of a scaling: with several scalings, one of each."""
        return word if len(self.spec.scalings) == 1 else f"{word}_{scaling}"

    def of_stack(
        self,
        verb: str,
        stack: StackSpec,
        body: Callable[[StackContext], object],
        **arguments: Value,
    ) -> Value:
        """Define a function for a stack and call it, on what it uses of the arguments and of
        ``gradients``, their bound, the stack's own ``state`` and, where some block has no gradient
        in this step, ``active``."""
        given = dict(arguments)
        for name in ("gradients", "max_block_norm", "state", "active"):
            if name in self.arguments:
                own = self.arguments[name]
                given[name] = own[stack.key] if name in ("state", "active") else own

        def build(update: UpdateGraph, values: dict[str, Value]) -> object:
            return body(StackContext(update, self.spec, stack, values))

        return self.update.function(f"{verb}_{stack.key}", describe(stack), given, build)

    def of_scaling(
        self,
        verb: str,
        scaling: ScalingSpec,
        section: str,
        body: Callable[[UpdateGraph, dict[str, Value]], object],
        **arguments: Value,
    ) -> Value:
        """Define a function for all stacks of a scaling together and call it."""
        name = self.name(verb, scaling)
        return self.update.function(name, section, arguments, body)

    def keep(self, name: str, stacks: Sequence[StackSpec], new: Value) -> None:
        """Return new state tensors of stacks, a list, from the function."""
        for index, stack in enumerate(stacks):
            self.result.setdefault(stack.key, {})[name] = new[index]

    def actives(self, stacks: Sequence[StackSpec]) -> Value:
        """Which entries of stacks have a gradient in this step; None where all have."""
        if not self.spec.partial:
            return None
        return self.each("active", stacks)


def kept(update: UpdateGraph, active: Value | None, new: Value, old: Value) -> Value:
    """A list of new state tensors; of blocks that have no gradient in this step the old ones."""
    return new if active is None else update.call(where_active, active, new, old)
