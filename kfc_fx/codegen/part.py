"""The update of a part of the blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kfc_fx.codegen.scalings.rules import steps_by_vector
from kfc_fx.codegen.spec import UpdateSpec


def of_stacks(spec: UpdateSpec, stacks: Collection[str]) -> UpdateSpec:
    """The update of some stacks, by key; the whole one where these are all."""
    kept = [stack for stack in spec.stacks if stack.key in stacks]
    if len(kept) == len(spec.stacks):
        return spec
    return part_of(spec, {block.name for stack in kept for block in stack.blocks})


def part_of(spec: UpdateSpec, blocks: Collection[str]) -> UpdateSpec:
    """The update of some blocks, by name, beside that of the generic parameters."""
    own = [[b for b in stack.blocks if b.name in blocks] for stack in spec.stacks]
    pairs = zip(spec.stacks, own, strict=True)
    stacks = tuple(replace(stack, blocks=tuple(found)) for stack, found in pairs if found)
    used = {stack.scaling for stack in stacks}
    has_vectors = any(steps_by_vector(scaling.generator) for scaling in used)
    return replace(
        spec,
        stacks=stacks,
        momentum=tuple(s for s in spec.momentum if s == "generic" or s in used),
        nesterov=tuple(s for s in spec.nesterov if s in used),
        orthogonalize=tuple(s for s in spec.orthogonalize if s in used),
        clip=spec.clip if has_vectors else "none",
    )
