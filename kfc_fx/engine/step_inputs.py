"""What a step takes: its numbers, from the optimizer, and all the tensors that it reads.

:func:`arguments` is the border to generated code: it alone knows the names of its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kfc_fx.codegen.spec import ScalingSpec, UpdateSpec
from kfc_fx.codegen.text.source import UpdateProgram
from kfc_fx.engine.host_numbers import stack_columns

Number = float | Tensor

OptionNumbers = Mapping[ScalingSpec, Mapping[str, float]]
"""The options of each scaling by the names that the generated code has for them."""


@dataclass(frozen=True)
class GenericNumbers:
    """The options of the generic parameters besides rate and momentum."""

    second_moment_decay: float
    eps: float


@dataclass(frozen=True)
class Momenta:
    """How much of the past each stack and each generic parameter keeps, in [0, 1)."""

    stacks: Mapping[str, Number]
    """By key: a number where all blocks of the stack share one, a column ``[depth, 1, 1]`` in its
    dtype where they differ."""
    generic: Mapping[str, float]
    """By parameter name."""

    def of_scaling(self, spec: UpdateSpec, scaling: ScalingSpec) -> float | None:
        """The number that all stacks of a scaling share; None where they differ."""
        own = [self.stacks[stack.key] for stack in spec.stacks_of(scaling)]
        return _shared(own)

    def of_generic(self, spec: UpdateSpec) -> float | None:
        """The number that all generic parameters of a spec share; None where they differ."""
        return _shared([self.generic[parameter.name] for parameter in spec.generic])

    def differ(self, spec: UpdateSpec) -> bool:
        """Whether those of one scaling, or of the generic parameters, that are kept differ."""
        kept = [scaling for scaling in spec.scalings if scaling in spec.momentum]
        shared = [self.of_scaling(spec, scaling) for scaling in kept]
        if "generic" in spec.momentum and spec.generic:
            shared.append(self.of_generic(spec))
        return None in shared


@dataclass(frozen=True)
class StepNumbers:
    """All that the optimizer says of a step besides the gradients."""

    step: int
    """Steps with this one: it counts from one."""
    rates: Mapping[str, Tensor]
    """Learning rates by stack, ``[depth, 1, 1]``."""
    generic_rates: Mapping[str, float]
    """Learning rates of generic parameters by name."""
    momenta: Momenta
    options: OptionNumbers
    generic: GenericNumbers
    clip: float | None
    """Bound on ν."""
    max_block_norm: float | None
    """Largest norm of a block's gradient."""
    shrink: Mapping[str, float]
    """By parameter name, what weight decay multiplies it by; read where some is decayed."""
    average_decay: float
    """ξ of the Polyak average, ``θ̄ ← ξ θ̄ + (1 − ξ) θ``; read where there is one."""


@dataclass(frozen=True)
class StepInputs:
    """Everything that the generated functions of a step read.

    Numbers may be tensors without dimensions, where they change from step to step in code that is
    compiled or recorded once.
    """

    parameters: Mapping[str, Tensor]
    """Those that the update changes, by name, in the order of the spec."""
    gradients: Mapping[str, Tensor]
    state: Mapping[str, Mapping[str, Tensor]]
    """By stack and name."""
    generic: Mapping[str, Sequence[Tensor]]
    """Moments ``m`` and ``v`` of the generic parameters, in the order of the spec."""
    average: Sequence[Tensor]
    """Polyak averages, in the order of the parameters."""
    master_weights: Mapping[str, Tensor]
    """Copies in single precision by parameter name."""
    active: Mapping[str, Tensor]
    """By stack which entries have a gradient, ``[depth, 1, 1]`` of bool."""
    step: Number
    rates: Mapping[str, Tensor]
    generic_rates: Any
    """A list in the order of the spec, or one number for all."""
    momenta: Mapping[ScalingSpec, Number]
    """By scaling, where its stacks share one."""
    stack_momenta: Mapping[str, Tensor]
    """By stack, where they have their own."""
    generic_momentum: Any
    """One number for all generic parameters, or where momenta differ a list in the order of the
    spec."""
    shrink: Any
    """A list in the order of the parameters, or one number for all."""
    options: OptionNumbers
    generic_options: GenericNumbers
    clip: float | None
    max_block_norm: float | None
    average_decay: float
    steps: Mapping[str, Tensor] = field(default_factory=dict)
    """Of blocks by parameter name, where they come from elsewhere."""
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    """v by stack, where the step pauses after it has them."""
    nu: Tensor | None = None
    """``vᵀ(F + γ)v`` by the exact Fisher matrix."""
    step_size: Tensor | None = None
    """What the quadratic model scales v by."""

    def scaled(self, vectors: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> StepInputs:
        """The inputs for the second half of a step that pauses.

        Args:
            vectors: v by stack.
            scales: what the exact Fisher matrix gives: ``nu``, or ``step_size`` and, with a
                momentum, ``momentum``.
        """
        momentum = scales.get("momentum")
        momenta = self.momenta if momentum is None else dict.fromkeys(self.momenta, momentum)
        nu, step_size = scales.get("nu"), scales.get("step_size")
        return replace(self, vectors=vectors, nu=nu, step_size=step_size, momenta=momenta)


def arguments(program: UpdateProgram, function: str, inputs: StepInputs) -> dict[str, Any]:
    """The arguments of a generated function, by the names that its text has for them."""
    names = program.arguments[function]
    return {name: value for name, value in _named(program.spec, inputs).items() if name in names}


def refresh_arguments(
    program: UpdateProgram,
    state: Mapping[str, Mapping[str, Tensor]],
    options: OptionNumbers,
    *,
    first: bool,
) -> dict[str, Any]:
    """The arguments of the generated ``refresh``, by the names that its text has for them.

    Args:
        first: whether there are no bases to go on from yet.
    """
    named = {"state": state, "first": first, **_options(program.spec, options)}
    return {name: named[name] for name in program.arguments["refresh"]}


def _named(spec: UpdateSpec, inputs: StepInputs) -> dict[str, Any]:
    momenta: dict[str, Any] = {spec.option("momentum", s): m for s, m in inputs.momenta.items()}
    if inputs.stack_momenta:
        momenta["momentum"] = inputs.stack_momenta
    return {
        "parameters": inputs.parameters,
        "gradients": inputs.gradients,
        "steps": inputs.steps,
        "state": inputs.state,
        "generic": inputs.generic,
        "average": inputs.average,
        "master_weights": inputs.master_weights,
        "active": inputs.active,
        "step": inputs.step,
        "lr": {**inputs.rates, "generic": inputs.generic_rates},
        **momenta,
        "generic_momentum": inputs.generic_momentum,
        **_options(spec, inputs.options),
        "generic_second_moment_decay": inputs.generic_options.second_moment_decay,
        "generic_eps": inputs.generic_options.eps,
        "clip": inputs.clip,
        "max_block_norm": inputs.max_block_norm,
        "shrink": inputs.shrink,
        "average_decay": inputs.average_decay,
        "v": inputs.vectors,
        "nu": inputs.nu,
        "step_size": inputs.step_size,
    }


def _options(spec: UpdateSpec, options: OptionNumbers) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for scaling in spec.scalings:
        for name, value in options[scaling].items():
            found[spec.option(name, scaling)] = value
    return found


def momenta_by_stack(spec: UpdateSpec, momenta: Momenta) -> dict[str, Tensor]:
    """Those of the stacks as columns ``[depth, 1, 1]``."""
    numbers = {
        stack.key: [value] * stack.depth
        for stack in spec.stacks
        if not isinstance(value := momenta.stacks[stack.key], Tensor)
    }
    stacks = [stack for stack in spec.stacks if stack.key in numbers]
    columns = {k: v for k, v in momenta.stacks.items() if isinstance(v, Tensor)}
    return columns | stack_columns(numbers, stacks)


def _shared(values: Sequence[Number]) -> float | None:
    first = values[0]
    if any(isinstance(value, Tensor) or value != first for value in values):
        return None
    return float(first)
