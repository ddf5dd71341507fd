"""What a module is that generates the code of a scaling, and which kind of scaling it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Protocol, TypeGuard, cast

from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.pieces.decompositions import Decomposition, Made
from kfc_fx.codegen.spec import ScalingSpec, StackSpec, StateEntry, UpdateSpec
from kfc_fx.codegen.text.update_graph import Value


class ScalingRule(Protocol):
    """Code for the stacks of one scaling; a module with these names is one."""

    SUMMARY: str
    """What ``apply`` does, in sentences, with ``{clip}`` where that is said."""
    OPTIONS: tuple[str, ...]
    """Options that ``apply`` takes as arguments, besides the momentum."""
    REFRESH_OPTIONS: tuple[str, ...]
    """Options that ``refresh`` takes."""
    REFRESH_SUMMARY: str
    FOLLOW_SUMMARY: str
    """Of a refresh that differs from the first one."""
    KEEPS_BASES: bool
    """Whether the state has an eigenbasis of each factor, so that the EMA may be kept in it."""
    COUNTS_EXAMPLES: bool
    """Whether the state has the number of examples that a gradient is the mean of."""

    def state_entries(self, stack: StackSpec, *, momentum: bool) -> dict[str, StateEntry]:
        """State besides the EMA of the factors, by name."""

    def decompositions(self, spec: UpdateSpec, stack: StackSpec) -> list[Decomposition]:
        """Those of ``refresh`` that may be made together with other stacks'."""

    def refresh(self, local: StackContext, made: Made) -> tuple[dict[str, Value], list[Value]]:
        """Factors into what ``apply`` needs, by name, and flags ``[depth]`` of what failed."""


class StepRule(ScalingRule, Protocol):
    """A scaling that computes its step at once."""

    def steps(self, context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
        """The steps of the parameters of each stack of the scaling, by their names."""


class VectorRule(ScalingRule, Protocol):
    """A scaling that adds to a momentum a vector v, which ν = vᵀ(F + γ)v bounds first."""

    def directions(self, context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
        """The v of each stack of the scaling, shaped like its gradient; where the clip takes ν
        from the factors, v and its part of ν."""


def rule_of(scaling: ScalingSpec) -> ScalingRule:
    """The generator of a scaling."""
    return cast(ScalingRule, scaling.generator)


def steps_by_vector(generator: ModuleType | ScalingRule) -> TypeGuard[VectorRule]:
    """Whether a generator is a :class:`VectorRule`; else it is a :class:`StepRule`."""
    return hasattr(generator, "directions")


def step_rule_of(scaling: ScalingSpec) -> StepRule:
    """The generator of a scaling that computes its step at once."""
    return cast(StepRule, scaling.generator)


def vector_rule_of(scaling: ScalingSpec) -> VectorRule | None:
    """The generator of a scaling that steps by a vector; None for another scaling."""
    rule = rule_of(scaling)
    return rule if steps_by_vector(rule) else None
