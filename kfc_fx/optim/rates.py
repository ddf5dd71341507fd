"""Learning rates, momenta and options as the numbers of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.engine.host_numbers import stack_columns
from kfc_fx.engine.step_inputs import GenericNumbers, Momenta, Number, OptionNumbers
from kfc_fx.optim.groups import Group, momentum_of
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.scalings.inverse import Inverse

ADAMW_EPS = 1e-8
"""The default of torch.optim.AdamW."""


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of one step."""

    stacks: Mapping[str, Tensor]
    """By the key of the stack, ``[depth, 1, 1]``, or ``[depth, 1, columns]`` where a bias has
    another rate than its weight."""
    generic: Mapping[str, float]
    """By the name of the parameter."""


def learning_rates(
    spec: UpdateSpec, groups: Mapping[str, Group], generic_ratio: float, share: float = 1.0
) -> LearningRates:
    """The rates of the stacks and of the generic parameters.

    Args:
        groups: parameter group by parameter name.
        generic_ratio: learning rate of generic parameters relative to their group's.
        share: of all rates, that the step is taken with.
    """

    def rate(name: str) -> float:
        return share * float(groups[name]["lr"])

    columns: dict[str, list[float]] = {}
    for stack in spec.stacks:
        rates = [
            (rate(block.weight), rate(block.bias or block.weight))
            for block in stack.blocks
            for _ in range(block.groups)
        ]
        if all(of_weight == of_bias for of_weight, of_bias in rates):
            columns[stack.key] = [rate for rate, _ in rates]
        else:
            width = stack.first.columns - 1
            columns[stack.key] = [r for w, b in rates for r in (*([w] * width), b)]
    generic = {p.name: generic_ratio * rate(p.name) for p in spec.generic}
    return LearningRates(stack_columns(columns, spec.stacks), generic)


def warm_up_share(warmup: int | None, step: int) -> float:
    """The share of the rate that a step is taken with.

    Args:
        step: from one.
    """
    return 1.0 if warmup is None else min(1.0, step / warmup)


def momenta(spec: UpdateSpec, options: KFCOptions, groups: Mapping[str, Group]) -> Momenta:
    """The momentum of each stack and of each generic parameter.

    Args:
        groups: parameter group by parameter name; one that sets another first beta than the default
            has it in place of those of the scalings and of the generic rule.
    """
    stacks: dict[str, Number] = {}
    columns: dict[str, list[float]] = {}
    for stack in spec.stacks:
        own = options.by_block.value_of(stack.scaling).first_beta
        found = [
            momentum_of(groups[block.weight], options.betas, own)
            for block in stack.blocks
            for _ in range(block.groups)
        ]
        if len(set(found)) == 1:
            stacks[stack.key] = found[0]
        else:
            columns[stack.key] = found
    differing = [stack for stack in spec.stacks if stack.key in columns]
    own = options.generic.betas[0]
    generic = {p.name: momentum_of(groups[p.name], options.betas, own) for p in spec.generic}
    return Momenta(stacks | stack_columns(columns, differing), generic)


def generic_numbers(options: KFCOptions) -> GenericNumbers:
    """The options of the generic parameters besides rate and momentum."""
    return GenericNumbers(second_moment_decay=options.generic.betas[1], eps=ADAMW_EPS)


def option_numbers(
    spec: UpdateSpec, options: KFCOptions, inverse_damping: float | None = None
) -> OptionNumbers:
    """The options of each scaling in use, by the names that the generated code has for them.

    Args:
        inverse_damping: of blocks by the general scaling's damping where that is "inverse", as it
            was adapted.
    """
    found = {}
    for scaling in spec.scalings:
        value = options.by_block.value_of(scaling)
        own = {name: number for name, number in value.numbers().items() if name != "momentum"}
        adapted = isinstance(value, Inverse) and value.damping == options.damping
        if inverse_damping is not None and adapted:
            own["damping"] = inverse_damping
        found[scaling] = own
    return found
