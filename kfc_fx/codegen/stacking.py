"""Which blocks are computed together: layers of one shape share stacked tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kfc_fx.codegen.spec import ScalingSpec, StackSpec
from kfc_fx.plan.forms import FactorForms
from kfc_fx.plan.spec import BlockSpec


@dataclass(frozen=True)
class BlockChoice:
    """What the options say of a block."""

    scaling: ScalingSpec
    forms: FactorForms


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
