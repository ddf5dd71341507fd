"""Which blocks are computed together: layers of one shape share stacked tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kfc_fx.plan.forms import FactorForms, statistic_shapes
from kfc_fx.plan.spec import BlockSpec

Scaling = Literal["adam", "spectral", "eigen", "inverse"]
"""How a gradient is scaled by the factors of its block."""


@dataclass(frozen=True)
class BlockChoice:
    """What the options say of a block."""

    scaling: Scaling
    forms: FactorForms


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
    scaling: Scaling
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

    @property
    def depth(self) -> int:
        """Entries of the stack."""
        return sum(block.groups for block in self.blocks)

    @property
    def bias(self) -> bool:
        """Whether the blocks have a bias column."""
        return self.first.bias is not None

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Block name to the entries ``[start, stop)`` that it occupies."""
        spans, start = {}, 0
        for block in self.blocks:
            spans[block.name] = (start, start + block.groups)
            start += block.groups
        return spans

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and stacked shape of each factor that is kept as an EMA; the parts of one that is
        cut follow each other."""
        shapes = statistic_shapes(self.first, self.forms)
        parts = self.parts
        return {name: (self.depth * parts[name], *shape[1:]) for name, shape in shapes.items()}

    @property
    def parts(self) -> dict[str, int]:
        """Name of each factor and the diagonal blocks that it is cut into."""
        shapes = statistic_shapes(self.first, self.forms)
        return {name: shape[0] // self.first.groups for name, shape in shapes.items()}

    @property
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
        return self.scaling == "eigen"

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Stacked shape of ``[W b]`` and of everything shaped like the gradient."""
        return self.depth, self.first.rows, self.first.columns


def stack_blocks(
    blocks: Sequence[BlockSpec],
    choice_of: Callable[[BlockSpec], BlockChoice],
    placement_of: Callable[[BlockSpec], tuple[str, str, bool]],
) -> tuple[StackSpec, ...]:
    """Group blocks by shape, scaling, form, device and dtype, in the order of their first member.

    Args:
        placement_of: block to (device, dtype, converts) of its state.
    """
    members: dict[tuple[BlockChoice, object], list[BlockSpec]] = {}
    for block in blocks:
        choice, placement = choice_of(block), placement_of(block)
        shape = (block.rows, block.channels, block.offsets, block.bias is not None)
        if choice.forms.input != "separable" and choice.forms.input_parts == 1:
            shape = (block.rows, block.columns, 0, False)
        kind = (choice, (shape, block.bias is None, placement))
        members.setdefault(kind, []).append(block)
    stacks: list[StackSpec] = []
    for (choice, _), group in members.items():
        key = _unused_key(_shape_key(group[0], choice.forms), stacks)
        placement = placement_of(group[0])
        stacks.append(StackSpec(key, choice.scaling, choice.forms, tuple(group), *placement))
    return tuple(stacks)


def _shape_key(block: BlockSpec, forms: FactorForms) -> str:
    rows = f"{block.rows}{'d' if forms.output == 'diagonal' else _parts_key(forms.output_parts)}"
    if forms.input == "separable":
        return f"{rows}x{block.channels}x{block.offsets}{'b' if block.bias else ''}"
    columns = "d" if forms.input == "diagonal" else _parts_key(forms.input_parts)
    return f"{rows}x{block.columns}{columns}"


def _parts_key(parts: int) -> str:
    return f"p{parts}" if parts > 1 else ""


def _unused_key(key: str, stacks: Sequence[StackSpec]) -> str:
    """Stacks of one shape on two devices, or with and without bias, need names of their own."""
    taken = {stack.key for stack in stacks}
    candidate, copy = key, 2
    while candidate in taken:
        candidate, copy = f"{key}_{copy}", copy + 1
    return candidate
