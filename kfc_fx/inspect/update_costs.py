"""The work of the generated update, counted by running it on tensors without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.engine.engine import UpdateEngine
from kfc_fx.engine.screening import ScreenedStatistics
from kfc_fx.engine.state import SavedState, dtype_of, state_entries
from kfc_fx.engine.step_inputs import StepNumbers, refresh_arguments
from kfc_fx.inspect.counting import Work, WorkCounter
from kfc_fx.inspect.methods import counted_call
from kfc_fx.optim.groups import Group
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.rates import generic_numbers, learning_rates, momenta, option_numbers


@dataclass(frozen=True)
class UpdateWork:
    """The work of each part of the update."""

    accumulate: Work
    refresh: Work
    apply: Work


def state_bytes(spec: UpdateSpec, stack: StackSpec) -> dict[str, int]:
    """Bytes of each state tensor of a stack, by name."""
    return {
        name: torch.Size(entry.shape).numel() * dtype_of(spec, stack, entry).itemsize
        for name, entry in state_entries(spec, stack).items()
    }


def factor_bytes(spec: UpdateSpec, stack: StackSpec) -> int:
    """Bytes of the factors of a stack and of their bases or inverses."""
    moments = ("v", "m", "p", "mass", "locations", "examples")
    sizes = state_bytes(spec, stack)
    return sum(size for name, size in sizes.items() if name not in moments)


def update_work(
    spec: UpdateSpec,
    options: KFCOptions,
    parameters: Mapping[str, Tensor],
    groups: Mapping[str, Group],
) -> UpdateWork:
    """Work of one ``accumulate``, one later ``refresh`` and one ``apply``.

    Args:
        spec: as the optimizer made it.
        parameters: of the model, by name; only their shapes and dtypes are read.
        groups: parameter group by the name of each parameter that is updated.
    """
    engine, counter = engine_without_data(spec, parameters), WorkCounter()
    statistics = statistics_without_data(engine.spec)
    accumulate = counted_call(counter, lambda: engine.accumulate(statistics))
    program, scalings = engine.program, option_numbers(engine.spec, options)
    given = refresh_arguments(program, engine.state, scalings, first=False)
    refreshed = counted_call(counter, lambda: program.functions["refresh"](**given))
    gradients = {name: torch.empty_like(engine.parameters[name]) for name in spec.parameters}
    numbers = _numbers(engine.spec, options, groups)
    scales = dict.fromkeys(("nu", "step_size", "momentum"), torch.empty((), device="meta"))
    applied = counted_call(
        counter, lambda: engine.apply(gradients, numbers, lambda *_: dict(scales))
    )
    return UpdateWork(accumulate, refreshed, applied)


def engine_without_data(spec: UpdateSpec, parameters: Mapping[str, Tensor]) -> UpdateEngine:
    """An engine that has taken no step, all of whose tensors are on the meta device."""
    without_data = {name: torch.empty_like(p, device="meta") for name, p in parameters.items()}
    stacks = tuple(replace(stack, device="meta") for stack in spec.stacks)
    return UpdateEngine(replace(spec, stacks=stacks), SavedState.empty(), without_data)


def statistics_without_data(spec: UpdateSpec) -> ScreenedStatistics:
    """Statistics of every block, on the meta device."""
    sums = {
        f"{block.name}.{factor}": _empty((block.groups * stack.parts[factor], *shape[1:]), stack)
        for stack in spec.stacks
        for block in stack.blocks
        for factor, shape in stack.factor_shapes.items()
    }
    columns = {stack.key: _empty((stack.depth, 1, 1), stack) for stack in spec.stacks}
    return ScreenedStatistics(sums, 1, columns, columns, ())


def _empty(shape: tuple[int, ...], stack: StackSpec) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, stack.dtype), device="meta")


def _numbers(spec: UpdateSpec, options: KFCOptions, groups: Mapping[str, Group]) -> StepNumbers:
    """The numbers of a step; their values do not change its work."""
    rates = learning_rates(spec, groups, 1.0)
    return StepNumbers(
        step=1,
        rates=rates.stacks,
        generic_rates=rates.generic,
        momenta=momenta(spec, options, groups),
        options=option_numbers(spec, options),
        generic=generic_numbers(options),
        clip=options.bound.clip if options.bound else None,
        max_block_norm=options.max_block_norm,
        shrink=dict.fromkeys(spec.parameters, 1.0),
        average_decay=0.5,
    )
