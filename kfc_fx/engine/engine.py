"""Run generated updates: which program fits this step, and the state between steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from kfc_fx.artifacts import record_artifact
from kfc_fx.codegen.part import of_stacks, part_of
from kfc_fx.codegen.pieces.generic import moments_at_start
from kfc_fx.codegen.program import generate, generate_factors
from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.codegen.text.source import UpdateProgram
from kfc_fx.engine.compiled_step import compile_step, with_tensors
from kfc_fx.engine.factors import Factors, factors_of
from kfc_fx.engine.master_weights import MasterWeights
from kfc_fx.engine.missing_gradients import filled, present_part, still_parameters
from kfc_fx.engine.screening import ScreenedStatistics
from kfc_fx.engine.state import (
    SavedState,
    entries_of,
    fitting,
    refreshed_entries,
    stacked_state,
    state_by_block,
)
from kfc_fx.engine.static_step import StaticStep
from kfc_fx.engine.step_inputs import (
    Momenta,
    OptionNumbers,
    StepInputs,
    StepNumbers,
    arguments,
    momenta_by_stack,
    refresh_arguments,
)
from kfc_fx.errors import StepError
from kfc_fx.linalg.half import kept_dtype

MOST_STATIC = 2
"""Sets of parameters with gradients whose steps are recorded; each has buffers of its own."""
GENERIC_STATE = ("m", "v")


class UpdateEngine:
    """State of one optimizer, and the programs generated for it.

    A generated function is pure but for its writes to the parameters, which come last: what it
    returns replaces the state only after it has returned.
    """

    def __init__(
        self,
        spec: UpdateSpec,
        saved: SavedState,
        parameters: Mapping[str, Tensor],
        *,
        compiled: bool = False,
        captured: bool = False,
        momenta: Momenta | None = None,
    ) -> None:
        """``momenta``: those that code may be compiled or recorded with as fixed numbers; a step
        with others takes its own as tensors."""
        self.spec = spec
        self._momenta = momenta
        self._compiled = compiled
        self._captured = captured and not spec.pauses
        self._static: dict[UpdateSpec, StaticStep] = {}
        self.parameters: Mapping[str, Tensor] = parameters
        self._plan = {block.name: block.as_dict() for block in self.blocks}
        kept = {} if spec.given_steps else fitting(spec, saved.blocks)
        held = [] if spec.given_steps else self.blocks
        self.anew: list[str] = [block.name for block in held if block.name not in kept]
        """Blocks that ``saved`` has nothing for, or not what is kept of them now."""
        self.waiting: bool = bool(self.anew) or saved.waiting
        """Whether there are blocks without statistics."""
        self.started: bool = saved.started and not self.anew
        self.state: dict[str, dict[str, Tensor]] = (
            {} if spec.given_steps else stacked_state(spec, kept)
        )
        """By stack and name."""
        in_blocks = {name for block in self.blocks for name in block.parameters}
        self.generic: dict[str, dict[str, Tensor]] = {
            name: {key: self._moment(name, value) for key, value in entry.items()}
            for name, entry in saved.generic.items()
            if name not in in_blocks and all(self._fits(name, value) for value in entry.values())
        }
        self.average: dict[str, Tensor] = {
            name: self._placed(name, value, wide=name in spec.master_weights)
            for name, value in saved.average.items()
            if self._fits(name, value)
        }
        copies = {n: copy for n, copy in saved.master_weights.items() if self._fits(n, copy)}
        self._master_weights = MasterWeights(parameters, copies)
        self._programs: dict[UpdateSpec, UpdateProgram] = {}
        self._factor_programs: dict[UpdateSpec, UpdateProgram] = {}

    @property
    def blocks(self) -> list[Any]:
        """The blocks of all stacks."""
        return [block for stack in self.spec.stacks for block in stack.blocks]

    @property
    def held_stacks(self) -> tuple[StackSpec, ...]:
        """Stacks of the blocks that there is state of: all."""
        return self.spec.stacks

    @property
    def source(self) -> str:
        """The text of :attr:`program`."""
        return self.program.source

    @property
    def program(self) -> UpdateProgram:
        """The program for a step in which every parameter has a gradient."""
        return self.program_for(self.spec)

    def program_for(self, spec: UpdateSpec) -> UpdateProgram:
        """The program of a spec, generated once."""
        if spec not in self._programs:
            self._programs[spec] = program = generate(spec)
            record_artifact("update", lambda: program.source)
            if self._compiled:
                compile_step(program)
        return self._programs[spec]

    def _factor_program(self, spec: UpdateSpec) -> UpdateProgram:
        """``accumulate`` and ``refresh`` of a part of the stacks, generated once, or of all."""
        if spec == self.spec:
            return self.program
        if spec not in self._factor_programs:
            self._factor_programs[spec] = generate_factors(spec)
        return self._factor_programs[spec]

    def accumulate(self, statistics: ScreenedStatistics) -> None:
        """New statistics into the EMA of the factors of those stacks that have a rate in them."""
        spec = of_stacks(self.spec, statistics.rate)
        with record_function("kfc_fx::accumulate"):
            fresh = self._factor_program(spec).functions["accumulate"](
                statistics.sums, statistics.examples, statistics.rows, statistics.rate, self.state
            )
        self._update(fresh)
        self.waiting = False

    def can_refresh(self, stacks: Collection[str] | None = None) -> bool:
        """Whether there are statistics that a refresh would make something new of.

        Args:
            stacks: keys of those to refresh; None for all.
        """
        written_out = self._written_out(stacks)
        return not any(set(names) - set(self.state[key]) for key, names in written_out.items())

    def refresh(self, options: OptionNumbers, stacks: Collection[str] | None = None) -> list[str]:
        """Factors into inverses, bases or whitening matrices; returns the blocks for which that
        failed.

        Args:
            stacks: keys of those to refresh; None for all.
        """
        if not self.can_refresh(stacks):
            return []
        spec = self.spec if stacks is None else of_stacks(self.spec, stacks)
        found = self._refreshed(self._factor_program(spec), self.state, options)
        self._take_refreshed({key: entries for key, (entries, _) in found.items()})
        return failed_blocks(spec, {key: failed for key, (_, failed) in found.items()})

    def refreshed_blocks(
        self, blocks: Collection[str], options: OptionNumbers
    ) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """What a refresh makes of some blocks, by name, and those for which it failed. The state
        stays as it is: :meth:`take_refreshed` changes it."""
        spec = part_of(self.spec, blocks)
        if not spec.stacks:
            return {}, []
        whole = {stack.key: stack for stack in self.spec.stacks}
        state = {
            stack.key: {
                name: torch.cat([entries_of(value, whole[stack.key], span) for span in spans])
                for name, value in self.state[stack.key].items()
            }
            for stack in spec.stacks
            for spans in [[whole[stack.key].spans[block.name] for block in stack.blocks]]
        }
        found = self._refreshed(self._factor_program(spec), state, options)
        made = {key: state[key] | dict(entries) for key, (entries, _) in found.items()}
        names = {stack.key: refreshed_entries(spec, stack) for stack in spec.stacks}
        for key, (entries, _) in found.items():
            if unknown := set(entries) - set(names[key]):
                raise StepError(
                    f"a refresh of {key} changes {sorted(unknown)}, which no rank sends"
                )
        kept = {key: {name: made[key][name] for name in own} for key, own in names.items()}
        by_block = state_by_block(spec, kept)
        failed = failed_blocks(spec, {key: flags for key, (_, flags) in found.items()})
        return {name: by_block[name] for name in by_block}, failed

    def take_refreshed(self, blocks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what refreshes have made of the blocks of some stacks, by name."""
        found: dict[str, dict[str, Tensor]] = {}
        for stack in self.spec.stacks:
            if stack.first.name not in blocks:
                continue
            own = [blocks[block.name] for block in stack.blocks]
            found[stack.key] = {name: torch.cat([each[name] for each in own]) for name in own[0]}
        self._take_refreshed(found)

    def _refreshed(
        self, program: UpdateProgram, state: Mapping[str, Mapping[str, Tensor]], options: Any
    ) -> dict[str, tuple[Mapping[str, Tensor], Tensor]]:
        given = refresh_arguments(program, state, options, first=not self.started)
        with record_function("kfc_fx::refresh"):
            found: dict[str, Any] = program.functions["refresh"](**given)
        return found

    def _take_refreshed(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._update(found)
        for key, names in self._written_out(found).items():
            for name in names:
                del self.state[key][name]
        self.started = not self.waiting

    def _written_out(self, stacks: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
        """The factors of stacks that are written out until they are refreshed."""
        return {
            stack.key: self.spec.factors_in_basis_of(stack)
            for stack in self.spec.stacks
            if stacks is None or stack.key in stacks
        }

    def apply(
        self,
        gradients: Mapping[str, Tensor],
        numbers: StepNumbers,
        scales_of: Callable[..., dict[str, Tensor]],
        steps: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """One step; returns what it reports, ν and the clip scale.

        Args:
            gradients: by name; parameters without one are left alone.
            numbers: rates, momenta and options of this step.
            scales_of: called in the middle of a step that pauses, with v by parameter name and,
                for the quadratic model, the momentum; returns ``nu``, or ``step_size`` and
                ``momentum``. Where ranks share the blocks it is called with this one's part of ν.
            steps: of the blocks by parameter name, where the spec has them from elsewhere.
        """
        spec = self._spec_of(gradients, numbers.momenta)
        program = self.program_for(spec)
        inputs = replace(self._inputs(spec, gradients, numbers), steps=steps or {})
        if self._captures(spec):
            static = self._static_step(program, inputs)
            with record_function("kfc_fx::apply"):
                result = static.run(inputs)
        else:
            result = self._run(program, inputs, scales_of)
        self._master_weights.note_written()
        return self._commit(spec, result)

    def guards(self, gradients: Mapping[str, Tensor], momenta: Momenta) -> bool:
        """Whether a step on these gradients looks itself, on the device, whether they are finite;
        :meth:`take_skipped` tells afterwards."""
        return self._captured and self._captures(self._spec_of(gradients, momenta))

    def take_skipped(self) -> int:
        """How many of the steps since the last call were not taken; one synchronisation for each
        set of parameters that had gradients."""
        total = 0
        for static in self._static.values():
            count = int(static.skipped)
            if count:
                static.skipped.zero_()
                static.forget_skipped(count)
            total += count
        return total

    def take_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Update these tensors from now on, by the same names."""
        self.parameters = dict(parameters)
        self._master_weights.take_parameters(self.parameters)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Put the state back as it was if the body raises.

        Generated functions write to no state tensor, so that references are enough.
        """
        before = (
            {key: dict(own) for key, own in self.state.items()},
            {name: dict(entry) for name, entry in self.generic.items()},
            dict(self.average),
            self.started,
            self.waiting,
        )
        try:
            yield
        except BaseException:
            self.state, self.generic, self.average, self.started, self.waiting = before
            raise

    def held(self) -> SavedState:
        """The state by name, in the tensors that it is in."""
        return SavedState(
            state_by_block(self.spec, self.state),
            {name: dict(entry) for name, entry in self.generic.items()},
            dict(self.average),
            self._master_weights.held(),
            self.started,
            dict(self._plan),
            self.waiting,
        )

    def factors(self, block: str) -> Factors:
        """Bias-corrected factors of a block."""
        stack = next(s for s in self.spec.stacks if block in s.spans)
        return factors_of(self.spec, stack, self.state[stack.key], block)

    # -- one step ------------------------------------------------------------------------

    def _run(
        self,
        program: UpdateProgram,
        inputs: StepInputs,
        scales_of: Callable[..., dict[str, Tensor]],
    ) -> dict[str, Any]:
        """The step launch by launch; between its halves the exact Fisher matrix is asked."""
        functions, spec = program.functions, program.spec
        if self._compiled:
            inputs = with_tensors(inputs, str(next(iter(inputs.parameters.values())).device))
        moments: dict[str, dict[str, Tensor]] = {}
        if spec.pauses:
            found = functions["precondition"](**arguments(program, "precondition", inputs))
            views = [found[name] for name in ("views", "momenta", "nu") if name in found]
            inputs = inputs.scaled(found["v"], scales_of(*views))
            moments = found.get("state", {})
        with record_function("kfc_fx::apply"):
            result = functions["apply"](**arguments(program, "apply", inputs))
        return result | {key: own | result.get(key, {}) for key, own in moments.items()}

    def _captures(self, spec: UpdateSpec) -> bool:
        """Whether the step of a spec is static: where all blocks have gradients, and of generic
        parameters the same few have none as in most steps."""
        if not self._captured or spec.partial:
            return False
        return spec in self._static or len(self._static) < MOST_STATIC

    def _static_step(self, program: UpdateProgram, inputs: StepInputs) -> StaticStep:
        """That of a program, made anew where it does not fit any more."""
        static = self._static.get(program.spec)
        if static is None or not static.fits(inputs):
            fresh = StaticStep(program, inputs)
            if static is not None:
                fresh.skipped += static.skipped
            self._static[program.spec] = static = fresh
        return static

    def _spec_of(self, gradients: Mapping[str, Tensor], momenta: Momenta) -> UpdateSpec:
        """The spec for the gradients and the momenta of a step."""
        spec = present_part(self.spec, gradients)
        fixed = self._compiled or self._captured
        own = momenta.differ(spec) or (fixed and momenta != self._momenta)
        return replace(spec, own_momenta=True) if own else spec

    def _inputs(
        self, spec: UpdateSpec, gradients: Mapping[str, Tensor], numbers: StepNumbers
    ) -> StepInputs:
        """Everything that a step reads."""
        still = still_parameters(self.spec, gradients) if spec.weight_decay else set()
        self._start_generic(spec, gradients, numbers)
        self._start_average(spec)
        active: dict[str, Tensor] = {}
        if spec.partial and not spec.given_steps:
            gradients, active = filled(self.spec, gradients, self.parameters)
        own, momenta = spec.own_momenta, numbers.momenta
        kept = [scaling for scaling in spec.scalings if scaling in spec.momentum]
        shared = [scaling for scaling in kept if not spec.has_own_momenta(scaling)]
        generic = [momenta.generic[parameter.name] for parameter in spec.generic]
        return StepInputs(
            parameters={name: self.parameters[name] for name in spec.parameters},
            gradients=gradients,
            state=self.state,
            generic={n: [self.generic[p.name][n] for p in spec.generic] for n in GENERIC_STATE},
            average=[self.average[name] for name in spec.parameters] if spec.average else [],
            master_weights=self._master_weights.of(spec.master_weights),
            active=active,
            step=numbers.step,
            rates=numbers.rates,
            generic_rates=[numbers.generic_rates[p.name] for p in spec.generic],
            momenta={s: momenta.of_scaling(spec, s) or 0.0 for s in shared},
            stack_momenta=momenta_by_stack(spec, momenta) if len(shared) < len(kept) else {},
            generic_momentum=generic if own else next(iter(generic), 0.0),
            shrink=[1.0 if name in still else numbers.shrink[name] for name in spec.parameters]
            if spec.weight_decay
            else [],
            options=numbers.options,
            generic_options=numbers.generic,
            clip=numbers.clip,
            max_block_norm=numbers.max_block_norm,
            average_decay=numbers.average_decay,
        )

    def _fits(self, name: str, value: Tensor) -> bool:
        """Whether a value is of a parameter of this size, and not of one that was replaced."""
        return name in self.parameters and self.parameters[name].shape == value.shape

    def _placed(self, name: str, value: Tensor, *, wide: bool) -> Tensor:
        """A state tensor on its parameter's device, in its dtype or, ``wide``, at least float32."""
        own = self.parameters[name]
        dtype = torch.promote_types(own.dtype, torch.float32) if wide else own.dtype
        return value.detach().to(own.device, dtype)

    def _moment(self, name: str, value: Tensor) -> Tensor:
        """A moment of a generic parameter, as it is kept."""
        placed = self._placed(name, value, wide=True)
        return placed.to(kept_dtype(placed.dtype, halves=self.spec.half_moments))

    def _start_generic(
        self, spec: UpdateSpec, gradients: Mapping[str, Tensor], numbers: StepNumbers
    ) -> None:
        """Moments of generic parameters that have a gradient for the first time."""
        decay, step = numbers.generic.second_moment_decay, numbers.step
        for name in (parameter.name for parameter in spec.generic):
            if name not in self.generic:
                gradient = self._placed(name, gradients[name], wide=True)
                momentum = numbers.momenta.generic[name]
                moments = moments_at_start(spec, gradient, momentum, decay, step)
                kept = [self._moment(name, moment) for moment in moments]
                self.generic[name] = dict(zip(GENERIC_STATE, kept, strict=True))

    def _start_average(self, spec: UpdateSpec) -> None:
        for name in spec.parameters if spec.average else ():
            own = self._placed(name, self.parameters[name], wide=name in spec.master_weights)
            self.average.setdefault(name, own.clone())

    def _update(self, fresh: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put new entries of stacks in place of old ones."""
        self.state = {key: own | dict(fresh.get(key, {})) for key, own in self.state.items()}

    def _commit(self, spec: UpdateSpec, returned: Mapping[str, Any]) -> dict[str, Tensor]:
        """New state in place of the old; returns the report."""
        result = dict(returned)
        report: dict[str, Tensor] = result.pop("report", {})
        for key, values in result.pop("generic", {}).items():
            for parameter, value in zip(spec.generic, values, strict=True):
                self.generic[parameter.name][key] = value
        for name, value in zip(spec.parameters, result.pop("average", ()), strict=False):
            self.average[name] = value
        self._update(result)
        return report


def failed_blocks(spec: UpdateSpec, failed: Mapping[str, Tensor]) -> list[str]:
    """Names of blocks with a failure; one synchronisation for all stacks."""
    first = spec.stacks[0].device
    flat = torch.cat([failed[stack.key].to(first) for stack in spec.stacks]).tolist()
    if not any(flat):
        return []
    names: list[str] = []
    start = 0
    for stack in spec.stacks:
        names += _names_of(stack, flat[start : start + stack.depth])
        start += stack.depth
    return names


def _names_of(stack: StackSpec, flags: Sequence[bool]) -> list[str]:
    return [name for name, (start, stop) in stack.spans.items() if any(flags[start:stop])]
