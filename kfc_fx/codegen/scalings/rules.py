"""The four ways to scale a gradient by the factors of its block, as ways to generate code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.decompositions import Decomposition
from kfc_fx.codegen.scalings import adam, eigen, inverse, spectral
from kfc_fx.codegen.spec import StackSpec, StateEntry
from kfc_fx.codegen.text.update_graph import Value
from kfc_fx.plan.choices import Scaling


class ScalingRule(Protocol):
    """Code for the stacks of one scaling; a module with these names is one."""

    SUMMARY: str
    """What ``apply`` does, with ``{clip}`` where that is said."""
    OPTIONS: tuple[str, ...]
    """Options that ``apply`` takes as arguments, besides the momentum."""
    REFRESH_OPTIONS: tuple[str, ...]
    """Options that ``refresh`` takes."""
    REFRESH_SUMMARY: str
    START_SUMMARY: str | None
    """Of the first refresh, where it differs from the others."""

    def state_entries(self, stack: StackSpec, *, momentum: bool) -> dict[str, StateEntry]:
        """State besides the EMA of the factors, without the stack's key."""

    def decompositions(
        self, context: Context, stack: StackSpec, *, first: bool
    ) -> list[Decomposition]:
        """Those of ``refresh`` that may be made together with other stacks'."""

    def refresh(self, context: Context, stack: StackSpec, *, first: bool) -> list[Value]:
        """Factors into what ``apply`` needs; returns flags ``[depth]`` of what failed."""


class StepRule(ScalingRule, Protocol):
    """A scaling that computes its step at once."""

    def steps(self, context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
        """The step of each stack of the scaling, shaped like its gradient; its code is complete
        when it is yielded."""


class VectorRule(ScalingRule, Protocol):
    """A scaling that adds to a momentum a vector v, which ν = vᵀ(F + γ)v bounds first."""

    def directions(
        self, context: Context, stacks: Sequence[StackSpec]
    ) -> Iterator[tuple[Value, Value]]:
        """The gradient of each stack of the scaling and its v."""


STEP_RULES: dict[Scaling, StepRule] = {"adam": adam, "spectral": spectral}
VECTOR_RULES: dict[Scaling, VectorRule] = {"eigen": eigen, "inverse": inverse}
RULES: dict[Scaling, ScalingRule] = {**STEP_RULES, **VECTOR_RULES}
