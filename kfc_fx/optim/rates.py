"""Learning rates and options as arguments of the generated code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.engine.host_numbers import stack_columns
from kfc_fx.errors import OptionError
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.update_spec import Group


def learning_rates(
    spec: UpdateSpec, groups: Mapping[str, Group], generic_ratio: float
) -> dict[str, Any]:
    """``lr`` argument of the generated update: by stack ``[depth, 1, 1]``, and a list for generic.

    Args:
        groups: parameter group by parameter name.
        generic_ratio: learning rate of generic parameters relative to their group's.

    Raises:
        OptionError: weight and bias of one layer have different rates.
    """
    columns: dict[str, list[float]] = {}
    for stack in spec.stacks:
        column = columns.setdefault(stack.key, [])
        for block in stack.blocks:
            weight_rate = float(groups[block.weight]["lr"])
            if block.bias is not None and float(groups[block.bias]["lr"]) != weight_rate:
                raise OptionError(
                    f"layer {block.name!r}: weight and bias have different learning rates, but "
                    "they are one block [W b]; give them one rate"
                )
            column += [weight_rate] * block.groups
    rates: dict[str, Any] = dict(stack_columns(columns, spec.stacks))
    rates["generic"] = {p.name: generic_ratio * float(groups[p.name]["lr"]) for p in spec.generic}
    return rates


def option_arguments(
    spec: UpdateSpec, options: KFCOptions, inverse_damping: float | None = None
) -> dict[str, Any]:
    """Options as arguments of the generated code, by the names that it may have for them.

    Args:
        inverse_damping: of "inverse", where it was adapted.
    """
    arguments: dict[str, Any] = {
        "generic_momentum": options.generic_momentum,
        "clip": options.clip,
    }
    for scaling in spec.scalings:
        own = {
            "momentum": options.momentum_of(scaling),
            "damping": options.damping_of(scaling),
            "second_moment_decay": options.second_moment_decay,
            "eps": options.eps,
            "orthogonalise": options.orthogonalise,
        }
        if scaling == "inverse" and inverse_damping is not None:
            own["damping"] = inverse_damping
        arguments |= {spec.option(name, scaling): value for name, value in own.items()}
    return arguments
