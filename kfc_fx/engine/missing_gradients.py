"""Steps in which some parameters have no gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kfc_fx.codegen.spec import UpdateSpec


def present_part(spec: UpdateSpec, names: Collection[str]) -> UpdateSpec:
    """The spec of a step.

    Args:
        names: parameters that have a gradient.
    """
    generic = tuple(g for g in spec.generic if g.name in names)
    given = tuple(name for name in spec.given_generic if name in names)
    in_blocks = [p for stack in spec.stacks for block in stack.blocks for p in block.parameters]
    partial = any(name not in names for name in in_blocks)
    if (generic, given) == (spec.generic, spec.given_generic) and not partial:
        return spec
    held = {g.name for g in generic} | {*in_blocks, *given}
    return replace(
        spec,
        generic=generic,
        given_generic=given,
        partial=partial,
        master_weights=tuple(name for name in spec.master_weights if name in held),
    )


def still_parameters(spec: UpdateSpec, names: Collection[str]) -> set[str]:
    """Parameters of blocks that lack a gradient: the whole block stays as it is.

    Args:
        names: parameters that have a gradient.
    """
    blocks = [block for stack in spec.stacks for block in stack.blocks]
    lacking = [block for block in blocks if any(p not in names for p in block.parameters)]
    return {name for block in lacking for name in block.parameters}


def filled(
    spec: UpdateSpec, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Zeros for missing gradients, and by stack which entries have none missing, ``[depth, 1, 1]``
    of bool."""
    found, active = dict(gradients), {}
    for stack in spec.stacks:
        flags: list[bool] = []
        for block in stack.blocks:
            present = all(name in gradients for name in block.parameters)
            flags += [present] * block.groups
            for name in block.parameters:
                found.setdefault(name, torch.zeros_like(parameters[name]))
        active[stack.key] = torch.tensor(flags, device=stack.device)[:, None, None]
    return found, active
