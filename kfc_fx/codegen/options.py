"""The options that shape the generated code; everything else is an argument of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kfc_fx.codegen.layout import Scaling, StackSpec

GenericRule = Literal["adamw", "sgd"]
Clip = Literal["none", "factors", "exact", "model"]
"""How the vectors v are scaled: not at all, by a bound on ν that is taken from the factors or from
the exact Fisher matrix, or by the rates that the exact quadratic model is least at."""


@dataclass(frozen=True)
class GenericParameter:
    """A parameter that is updated without a block."""

    name: str
    shape: tuple[int, ...]
    converts: bool
    """Whether it is in half precision, where its moments are in single precision."""


@dataclass(frozen=True)
class UpdateSpec:
    """All that the text of an update depends on."""

    title: str
    stacks: tuple[StackSpec, ...]
    generic: tuple[GenericParameter, ...]
    generic_rule: GenericRule
    momentum: tuple[Scaling | Literal["generic"], ...]
    """The scalings whose blocks keep a momentum, and whether generic parameters do."""
    nesterov: tuple[Scaling, ...]
    """The scalings whose momentum takes Nesterov's step ahead."""
    orthogonalise: bool
    """Whether "adam" moves what it has scaled towards its polar factor."""
    weight_decay: bool
    clip: Clip
    average: bool
    masters: tuple[str, ...]
    """Parameters in half precision that are updated through a copy in single precision."""
    partial: bool
    """Whether some block has no gradient in this step, so that updates must be masked."""
    orthogonal_iteration_from: int
    """Sides at least this wide refresh their basis by orthogonal iteration, not ``eigh``."""
    factors_in_basis: bool
    """Whether the EMA of a factor that has an eigenbasis Q is kept as Q and the diagonal of
    ``Qᵀ F Q``. Every statistic must be followed by a refresh then."""

    @property
    def pauses(self) -> bool:
        """Whether a step has two functions, between which the exact Fisher matrix is asked."""
        return self.clip in ("exact", "model")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter the update changes, in the order of its lists."""
        in_blocks = [p for stack in self.stacks for block in stack.blocks for p in block.parameters]
        return (*in_blocks, *(g.name for g in self.generic))

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """Those in use, in the order of their first stack."""
        return tuple(dict.fromkeys(stack.scaling for stack in self.stacks))

    def stacks_of(self, scaling: Scaling) -> list[StackSpec]:
        """The stacks of one scaling."""
        return [stack for stack in self.stacks if stack.scaling == scaling]

    def factors_in_basis_of(self, stack: StackSpec) -> tuple[str, ...]:
        """The factors of a stack whose EMA is kept in its eigenbasis; between a statistic and the
        refresh after it they are written out."""
        if not self.factors_in_basis or stack.scaling not in ("adam", "eigen"):
            return ()
        return tuple(stack.basis_shapes)

    def option(self, name: str, scaling: Scaling) -> str:
        """The argument that holds an option of a scaling: ``damping``, or where several scalings
        are in use ``damping_spectral``."""
        return name if len(self.scalings) == 1 else f"{name}_{scaling}"
