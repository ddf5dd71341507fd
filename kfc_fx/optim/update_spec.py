"""From a plan and options to the update that is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.codegen.scalings.rules import VECTOR_RULES
from kfc_fx.codegen.spec import GenericParameter, UpdateSpec
from kfc_fx.codegen.stacking import stack_blocks
from kfc_fx.compilation import Compilation
from kfc_fx.errors import OptionError
from kfc_fx.optim.gradients import as_real
from kfc_fx.optim.options import KFCOptions
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan

ORTHOGONAL_ITERATION_FROM = 128
"""Narrower sides take ``eigh`` at every refresh, which is cheap there and exact."""


Group = Mapping[str, Any]


def real_parameters(compilation: Compilation) -> dict[str, Tensor]:
    """The model's parameters by name; complex ones as pairs of real numbers, as
    ``torch.optim.AdamW`` steps them."""
    return {
        name: as_real(p.detach()).requires_grad_(p.requires_grad) if p.is_complex() else p
        for name, p in compilation.model.named_parameters()
    }


def update_spec(
    compilation: Compilation,
    options: KFCOptions,
    parameters: Mapping[str, Tensor],
    groups: Mapping[str, Group],
) -> UpdateSpec:
    """The update for the parameters that the optimizer holds.

    Args:
        parameters: all of the model, by name.
        groups: parameter group by the name of each parameter that is updated.

    Raises:
        OptionError: the plan has no block to precondition, or a group splits a block.
    """
    plan = compilation.plan
    options.check_patterns(plan)
    held = [block for block in plan.blocks if block.weight in groups]
    _check_blocks(plan, held, groups)
    choices = {block: choice for block in held if (choice := options.choice_of(block))}
    if not choices:
        raise OptionError(
            f"there is nothing to precondition: no layer among {len(held)} blocks takes scaling "
            f"{options.scaling!r}, which is for matrices whose sides are not too wide; use 'adam'"
        )

    def placement(block: BlockSpec) -> tuple[str, str, bool]:
        weight = parameters[block.weight]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return str(weight.device), str(dtype).removeprefix("torch."), dtype != weight.dtype

    in_blocks = {name for block in choices for name in block.parameters}
    scalings = {choice.scaling for choice in choices.values()}
    kept: list[Any] = [s for s in options.scalings if s in scalings and options.momentum_of(s)]
    kept += ["generic"] * (options.generic_momentum > 0)
    return UpdateSpec(
        title=type(compilation.model).__name__,
        stacks=stack_blocks(list(choices), choices.__getitem__, placement),
        generic=tuple(
            GenericParameter(name, tuple(p.shape), _is_half(p))
            for name, p in parameters.items()
            if name in groups and name not in in_blocks and p.requires_grad
        ),
        generic_rule=options.generic_rule,
        momentum=tuple(kept),
        nesterov=tuple(s for s in kept if s != "generic" and options.nesterov_of(s)),
        orthogonalise=options.orthogonalise > 0 and "adam" in scalings,
        weight_decay=any(group["weight_decay"] for group in groups.values()),
        clip=options.clipping if scalings & set(VECTOR_RULES) else "none",
        average=options.average is not None,
        masters=tuple(
            name
            for name, p in parameters.items()
            if options.masters and name in groups and p.requires_grad and _is_half(p)
        ),
        partial=False,
        orthogonal_iteration_from=ORTHOGONAL_ITERATION_FROM,
        factors_in_basis=options.factor_interval == options.inverse_interval,
    )


def _is_half(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _check_blocks(
    plan: CurvaturePlan, blocks: Sequence[BlockSpec], groups: Mapping[str, Group]
) -> None:
    if not blocks:
        reasons = "; ".join(f"{g.name}: {g.reason}" for g in plan.generic[:5]) or "none is trained"
        raise OptionError(
            "there is nothing to precondition: no conv or linear layer of the model is among the "
            f"optimizer's parameters ({reasons}). Use torch.optim for this model"
        )
    for block in blocks:
        if block.bias is not None and block.bias not in groups:
            raise OptionError(
                f"layer {block.name!r}: its weight is among the optimizer's parameters and its "
                "bias is not, but they are one block [W b]; pass both, or freeze the bias"
            )
