"""From a plan and options to the update that is generated."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kfc_fx.codegen.spec import GenericParameter, ScalingSpec, UpdateSpec
from kfc_fx.codegen.stacking import stack_blocks
from kfc_fx.errors import OptionError
from kfc_fx.optim.gradients import as_real
from kfc_fx.optim.groups import Group, check_second_beta, momentum_of
from kfc_fx.optim.options import KFCOptions
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan

ORTHOGONAL_ITERATION_FROM = 128
"""Narrower sides take ``eigh`` at every refresh, which is cheap there and exact."""


def real_parameters(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Parameters by name; complex ones as pairs of real numbers, as ``torch.optim.AdamW`` steps
    them."""
    return {
        name: as_real(p.detach()).requires_grad_(p.requires_grad) if p.is_complex() else p
        for name, p in named
    }


def update_spec(
    title: str,
    plan: CurvaturePlan,
    options: KFCOptions,
    parameters: Mapping[str, Tensor],
    groups: Mapping[str, Group],
    beside: Sequence[BlockSpec] = (),
    generic_beside: Collection[str] = (),
) -> UpdateSpec:
    """The update for the parameters that the optimizer holds.

    Args:
        title: of its code.
        parameters: all of the model, by name.
        groups: parameter group by the name of each parameter that is updated.
        beside: blocks that have a place beside those of the plan; ``generic_beside``: generic
            parameters, likewise. They are frozen, or not called, for a while.

    Raises:
        OptionError: the plan has no block to precondition, or a group splits a block.
    """
    options.by_block.check_patterns(plan)
    held = [block for block in plan.blocks if block.weight in groups]
    if beside:
        order = {name: place for place, name in enumerate(parameters)}
        held = sorted([*held, *beside], key=lambda block: order[block.weight])
    _check_blocks(plan, held, groups)
    choices = {block: choice for block in held if (choice := options.by_block.choice_of(block))}
    if not choices:
        raise OptionError(
            f"there is nothing to precondition: no layer among {len(held)} blocks takes "
            f"scaling={options.scaling.name!r}, which is for matrices whose sides are not too "
            "wide; use 'adam'"
        )

    def placement(block: BlockSpec) -> tuple[str, str, bool]:
        weight = parameters[block.weight]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return str(weight.device), str(dtype).removeprefix("torch."), dtype != weight.dtype

    in_blocks = {name for block in choices for name in block.parameters}
    scalings = {choice.scaling for choice in choices.values()}
    values = {spec: value for value, spec in options.by_block.specs.items() if spec in scalings}
    for group in groups.values():
        check_second_beta(group, options.betas)

    def moves(scaling: ScalingSpec) -> bool:
        own, held = (
            values[scaling].first_beta,
            (b for b, c in choices.items() if c.scaling == scaling),
        )
        return any(momentum_of(groups[block.weight], options.betas, own) > 0 for block in held)

    kept = [scaling for scaling in values if moves(scaling)]
    rest, own = set(groups) - in_blocks, options.generic.betas[0]
    generic_moves = any(momentum_of(groups[name], options.betas, own) > 0 for name in rest)
    return UpdateSpec(
        title=title,
        stacks=stack_blocks(list(choices), choices.__getitem__, placement),
        generic=tuple(
            GenericParameter(name, tuple(p.shape), _is_half(p))
            for name, p in parameters.items()
            if name in groups
            and name not in in_blocks
            and (p.requires_grad or name in generic_beside)
        ),
        generic_rule=options.generic.rule,
        momentum=(*kept, "generic") if generic_moves else tuple(kept),
        nesterov=tuple(s for s in kept if values[s].takes_nesterov),
        orthogonalize=tuple(s for s, value in values.items() if value.orthogonalizes),
        weight_decay=any(group["weight_decay"] for group in groups.values()),
        bounds_gradients=options.max_block_norm is not None,
        cautious_decay=options.cautious_decay,
        clip=options.clipping if any(v.steps_by_vector for v in values.values()) else "none",
        average=options.average is not None,
        own_momenta=False,
        master_weights=tuple(
            name
            for name, p in parameters.items()
            if options.master_weights and name in groups and p.requires_grad and _is_half(p)
        ),
        partial=False,
        orthogonal_iteration_from=ORTHOGONAL_ITERATION_FROM,
        half_moments=options.state_dtype == torch.bfloat16,
        factors_in_basis=options.statistics.every == options.statistics.refresh_every,
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
