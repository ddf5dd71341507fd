"""What an update is generated from: stacks of blocks, and the options that shape its code.

Everything else is an argument of the code.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from types import ModuleType
from typing import Literal

from kfc_fx.plan.forms import FactorForms, statistic_shapes, takes_matrix_step
from kfc_fx.plan.spec import BlockSpec

GenericRule = Literal["adamw", "sgd"]


Clip = Literal["none", "factors", "shared", "exact", "model"]
"""How the vectors v are scaled: not at all, by a bound on ν that is taken from the factors, here or
on several ranks that share the blocks, or from the exact Fisher matrix, or by the rates that the
exact quadratic model is least at."""


@dataclass(frozen=True)
class ScalingSpec:
    """A scaling as generated code knows it."""

    name: str
    """In the names of arguments and in comments: ``spectral``, and ``spectral_2`` for blocks of the
    same scaling with other options."""
    generator: ModuleType
    """A module that is a :class:`~kfc_fx.codegen.scalings.rules.ScalingRule`."""
    row_parts: int = 1
    """Matrices of equal height that the rows of a block are, each with a polar factor of its own:
    the heads of attention layers, and their queries, keys and values where these are one layer."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class StackSpec:
    """Blocks of one shape, stacked along a leading dimension of size ``depth``.

    A grouped convolution takes one entry per group. ``key`` names the stack in the state and
    in the generated source: ``64x577`` has 64 rows and 577 columns; ``512x512x9`` has 512 rows,
    512 channels and 9 offsets of a separable input factor (``b``: and a bias column); ``64x9000d``
    has a diagonal input factor, ``9000dx64`` a diagonal output factor; ``1024p2x64`` has an output
    factor in two parts.
    """

    key: str
    scaling: ScalingSpec
    forms: FactorForms
    blocks: tuple[BlockSpec, ...]
    device: str
    dtype: str
    converts: bool
    """Whether the parameters have another dtype than the state (half-precision weights)."""

    @property
    def first(self) -> BlockSpec:
        """Any block of the stack, for what they have in common."""
        return self.blocks[0]

    @cached_property
    def depth(self) -> int:
        """Entries of the stack."""
        return sum(block.groups for block in self.blocks)

    @property
    def bias(self) -> bool:
        """Whether the blocks have a bias column."""
        return self.first.bias is not None

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Block name to the entries ``[start, stop)`` that it occupies."""
        spans, start = {}, 0
        for block in self.blocks:
            spans[block.name] = (start, start + block.groups)
            start += block.groups
        return spans

    @cached_property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and stacked shape of each factor that is kept as an EMA. A factor that is cut into k
        parts has k matrices in place of one, next to each other."""
        shapes = statistic_shapes(self.first, self.forms)
        parts = self.parts
        return {name: (self.depth * parts[name], *shape[1:]) for name, shape in shapes.items()}

    @cached_property
    def parts(self) -> dict[str, int]:
        """Name of each factor and the diagonal blocks that it is cut into."""
        shapes = statistic_shapes(self.first, self.forms)
        return {name: shape[0] // self.first.groups for name, shape in shapes.items()}

    @cached_property
    def basis_shapes(self) -> dict[str, tuple[int, ...]]:
        """The factors that have an eigenbasis: all but diagonal ones, whose basis is I."""
        diagonal = {"omega"} if self.forms.input == "diagonal" else set()
        diagonal |= {"gamma"} if self.forms.output == "diagonal" else set()
        return {name: s for name, s in self.factor_shapes.items() if name not in diagonal}

    @property
    def has_bias_apart(self) -> bool:
        """Whether Ω keeps the entry of the bias column, |T|, apart from its other factors."""
        apart = self.forms.input == "separable" or self.forms.input_parts > 1
        return apart and self.bias

    @property
    def counts_examples(self) -> bool:
        """Whether the state has the number of examples that a gradient is the mean of."""
        return bool(self.scaling.generator.COUNTS_EXAMPLES)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Stacked shape of ``[W b]`` and of everything shaped like the gradient."""
        return self.depth, self.first.rows, self.first.columns

    @property
    def row_parts(self) -> int:
        """Matrices that the rows of an entry are, each with a polar factor of its own."""
        return self.scaling.row_parts if takes_matrix_step(self.first) else 1

    @property
    def polar_shape(self) -> tuple[int, int, int]:
        """Stacked shape of the matrices that have a polar factor each."""
        depth, rows, columns = self.matrix_shape
        return depth * self.row_parts, rows // self.row_parts, columns


@dataclass(frozen=True)
class StateEntry:
    """Shape of one stacked state tensor and what it starts from."""

    shape: tuple[int, ...]
    initial: Literal["zeros", "ones", "identity"]
    is_moment: bool = False
    """Whether it is a moving average of gradients or of their squares, which may be rounded."""


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
    momentum: tuple[ScalingSpec | Literal["generic"], ...]
    """The scalings whose blocks keep a momentum, and whether generic parameters do."""
    nesterov: tuple[ScalingSpec, ...]
    """The scalings whose momentum takes Nesterov's step ahead."""
    orthogonalize: tuple[ScalingSpec, ...]
    """The scalings that move what they have scaled towards its polar factor."""
    weight_decay: bool
    clip: Clip
    average: bool
    own_momenta: bool
    """Whether each stack and each generic parameter has a momentum of its own, in place of one
    number for all of a scaling."""
    master_weights: tuple[str, ...]
    """Parameters in half precision that are updated through a copy in single precision."""
    partial: bool
    """Whether some block has no gradient in this step, so that updates must be masked."""
    orthogonal_iteration_from: int
    """Sides at least this wide refresh their basis by orthogonal iteration, not ``eigh``."""
    factors_in_basis: bool
    """Whether the EMA of a factor that has an eigenbasis Q is kept as Q and the diagonal of
    ``Qᵀ F Q``. Every statistic must be followed by a refresh then."""
    bounds_gradients: bool = False
    """Whether the gradient of a block has a largest norm."""
    cautious_decay: bool = False
    """Whether numbers that a step takes away from zero do not decay in it, where others do."""
    half_moments: bool = False
    """Whether moments are kept in bfloat16, those that would be in float32."""
    given_steps: bool = False
    """Whether the steps of the blocks come from elsewhere, and the update has no state of them."""
    given_generic: tuple[str, ...] = ()
    """Parameters without a block whose steps come from elsewhere, besides :attr:`generic`."""

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        return self._hash  # every step looks its program up

    @property
    def pauses(self) -> bool:
        """Whether a step has two functions, between which the scale of v is found."""
        return self.clip in ("shared", "exact", "model")

    @property
    def takes_nu_from_factors(self) -> bool:
        """Whether ν is computed from the factors."""
        return self.clip in ("factors", "shared")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter the update changes, in the order of its lists."""
        in_blocks = [p for stack in self.stacks for block in stack.blocks for p in block.parameters]
        return (*in_blocks, *self.given_generic, *(g.name for g in self.generic))

    @property
    def scalings(self) -> tuple[ScalingSpec, ...]:
        """Those in use, in the order of their first stack."""
        return tuple(dict.fromkeys(stack.scaling for stack in self.stacks))

    def stacks_of(self, scaling: ScalingSpec) -> list[StackSpec]:
        """The stacks of one scaling."""
        return [stack for stack in self.stacks if stack.scaling == scaling]

    def has_own_momenta(self, scaling: ScalingSpec) -> bool:
        """Whether the momentum of a scaling is by stack. That of the quadratic model is one."""
        return self.own_momenta and scaling in self.momentum and self.clip != "model"

    def factors_in_basis_of(self, stack: StackSpec) -> tuple[str, ...]:
        """The factors of a stack whose EMA is kept in its eigenbasis; between a statistic and the
        refresh after it they are written out."""
        if not self.factors_in_basis or not stack.scaling.generator.KEEPS_BASES:
            return ()
        return tuple(stack.basis_shapes)

    def option(self, name: str, scaling: ScalingSpec) -> str:
        """The argument that holds an option of a scaling: ``damping``, or where several scalings
        are in use ``damping_spectral``."""
        return name if len(self.scalings) == 1 else f"{name}_{scaling}"


def describe(stack: StackSpec) -> str:
    """One comment line: shape and members of a stack."""
    names = ", ".join(block.name or "the model itself" for block in stack.blocks)
    grouped = f" in {stack.depth} groups" if stack.depth > len(stack.blocks) else ""
    return f"{stack.key}: {counted(len(stack.blocks), 'layer')}{grouped}: {names}"


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
