"""Run generated updates: which program fits this step, and the state between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from kfc_fx.artifacts import record_artifact
from kfc_fx.codegen.pieces.generic import moments_at_start
from kfc_fx.codegen.program import generate
from kfc_fx.codegen.scalings.rules import VECTOR_RULES
from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.codegen.text.source import UpdateProgram
from kfc_fx.engine.compiled_step import compile_step, tensor_arguments
from kfc_fx.engine.factors import Factors, joined
from kfc_fx.engine.masters import MasterWeights
from kfc_fx.engine.screening import ScreenedStatistics
from kfc_fx.engine.state import SavedState, entries_of, fitting, stacked_state, state_by_block
from kfc_fx.engine.static_step import StaticStep
from kfc_fx.linalg.eigenbasis import from_basis

MOST_STATIC = 2
"""Sets of parameters with gradients whose steps are recorded; each has buffers of its own."""
GENERIC_STATE = ("generic_m", "generic_v")


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
    ) -> None:
        self.spec = spec
        self._compiled = compiled
        self._captured = captured and not spec.pauses
        self._static: dict[UpdateSpec, StaticStep] = {}
        self.parameters = parameters
        kept = fitting(spec, saved.blocks)
        self.anew = [block.name for block in self.blocks if block.name not in kept]
        """Blocks that ``saved`` has nothing for, or not what is kept of them now."""
        self.waiting = bool(self.anew)
        """Whether there are blocks without statistics."""
        self.started = saved.started and not self.anew
        self.state: dict[str, Tensor] = stacked_state(spec, kept)
        self.generic = {
            name: {key: self._placed(name, value, wide=True) for key, value in entry.items()}
            for name, entry in saved.generic.items()
        }
        self.average = {
            name: self._placed(name, value, wide=name in spec.masters)
            for name, value in saved.average.items()
        }
        self._masters = MasterWeights(parameters, saved.masters)
        self._programs: dict[UpdateSpec, UpdateProgram] = {}

    @property
    def blocks(self) -> list[Any]:
        """The blocks of all stacks."""
        return [block for stack in self.spec.stacks for block in stack.blocks]

    @property
    def _factors_in_basis(self) -> list[str]:
        """Keys of the factors that are written out only from ``accumulate`` to ``refresh``."""
        return [
            f"{factor}_{stack.key}"
            for stack in self.spec.stacks
            for factor in self.spec.factors_in_basis_of(stack)
        ]

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

    def accumulate(self, statistics: ScreenedStatistics) -> None:
        """New statistics into the EMA of the factors."""
        with record_function("kfc_fx::accumulate"):
            self.state |= self.program.functions["accumulate"](
                statistics.sums, statistics.examples, statistics.rows, statistics.rate, self.state
            )
        self.waiting = False

    def refresh(self, arguments: Mapping[str, Any]) -> list[str]:
        """Factors into inverses, bases or whitening matrices; returns the blocks for which that
        failed.

        Args:
            arguments: values for the generated function's arguments besides the state.
        """
        in_basis = self._factors_in_basis
        if in_basis and in_basis[0] not in self.state:
            return []  # no statistics since the last refresh: it would change nothing
        functions = self.program.functions
        name = "start" if "start" in functions and not self.started else "refresh"
        with record_function("kfc_fx::refresh"):
            fresh, failed = self._call(self.program, name, {**arguments, "state": self.state})
        self.state |= fresh
        for key in in_basis:
            del self.state[key]
        self.started = not self.waiting
        return self._failed_blocks(failed)

    def apply(
        self,
        gradients: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
        scales_of: Callable[..., dict[str, Tensor]],
    ) -> dict[str, Any]:
        """One step; returns what it reports, ν and the clip scale.

        Args:
            gradients: by name; parameters without one are left alone.
            arguments: values for the generated function's other arguments.
            scales_of: called in the middle of a step that pauses, with v by parameter name and,
                for the quadratic model, the momentum; returns ``nu``, or ``step_size`` and
                ``momentum``.
        """
        spec = self._present(gradients)
        program = self.program_for(spec)
        given = {**arguments, "parameters": self.parameters, "gradients": gradients}
        given["state"] = self.state | self._lists(spec, given)
        given["masters"] = self._masters.of(spec.masters)
        given["lr"] = {
            **given["lr"],
            "generic": [given["lr"]["generic"][g.name] for g in spec.generic],
        }
        if spec.weight_decay:
            still = self._without_gradient(gradients)
            shrink = given["shrink"]
            given["shrink"] = [1.0 if n in still else shrink[n] for n in spec.parameters]
        if spec.partial:
            gradients, given["active"] = self._filled(gradients)
            given["gradients"] = gradients
        if self._captures(spec):
            static = self._static_step(spec, program, given)
            with record_function("kfc_fx::apply"):
                result = static.run(given)
            self._masters.note_written()
            return self._commit(spec, {**result, **static.report})
        if self._compiled:
            given |= tensor_arguments(given, spec.stacks[0].device)
        moments: dict[str, Tensor] = {}
        if spec.pauses:
            given["v"], *views, moments = self._call(program, "precondition", given)
            scales = scales_of(*views)
            momentum = scales.pop("momentum", None)
            if momentum is not None:
                given |= dict.fromkeys(self._momentum_arguments(spec), momentum)
            given |= scales
        with record_function("kfc_fx::apply"):
            result = self._call(program, "apply", given)
        self._masters.note_written()
        return self._commit(spec, {**moments, **result})

    def guards(self, gradients: Mapping[str, Tensor]) -> bool:
        """Whether a step on these gradients looks itself, on the device, whether they are finite;
        :meth:`take_skipped` tells afterwards."""
        return self._captures(self._present(gradients))

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

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Put the state back as it was if the body raises.

        Generated functions write to no state tensor, so that references are enough.
        """
        before = (
            dict(self.state),
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

    def saved(self) -> SavedState:
        """Copies of the state by name."""
        return SavedState(
            state_by_block(self.spec, self.state),
            {
                name: {k: v.clone() for k, v in entry.items()}
                for name, entry in self.generic.items()
            },
            {name: value.clone() for name, value in self.average.items()},
            self._masters.saved(),
            self.started,
        )

    def factors(self, block: str) -> Factors:
        """Bias-corrected factors of a block."""
        stack = next(s for s in self.spec.stacks if block in s.spans)
        span = stack.spans[block]

        def own(name: str) -> Tensor:
            return entries_of(self.state[f"{name}_{stack.key}"], stack, span)

        def corrected(name: str) -> Tensor | None:
            if name in self.spec.factors_in_basis_of(stack):
                value = from_basis(own(f"q_{name}"), own(f"eigenvalues_{name}"))
            elif f"{name}_{stack.key}" in self.state:
                value = own(name)
            else:
                return None
            parts = stack.parts.get(name, 1)
            corner = own("locations") if name == "omega" and stack.has_bias_apart else None
            return (joined(value, parts, corner) if parts > 1 else value) / mass

        mass = own("mass").clamp(min=1e-12)
        return Factors(
            output=corrected("gamma"),
            dense=corrected("omega"),
            channel=corrected("channel"),
            offset=corrected("offset"),
            locations=corrected("locations"),
        )

    # -- one step ------------------------------------------------------------------------

    def _captures(self, spec: UpdateSpec) -> bool:
        """Whether the step of a spec is static: where all blocks have gradients, and of generic
        parameters the same few have none as in most steps."""
        known = spec in self._static or len(self._static) < MOST_STATIC
        return self._captured and not spec.partial and known

    def _static_step(
        self, spec: UpdateSpec, program: UpdateProgram, given: Mapping[str, Any]
    ) -> StaticStep:
        """That of a spec, made anew where it does not fit any more."""
        static = self._static.get(spec)
        if static is None or not static.fits(given):
            fresh = StaticStep(spec, program, given)
            if static is not None:
                fresh.skipped += static.skipped
            self._static[spec] = static = fresh
        return static

    @staticmethod
    def _call(program: UpdateProgram, function: str, given: Mapping[str, Any]) -> Any:
        """Call a generated function with those of the given values that it takes."""
        nodes = program.graphs[function].graph.nodes
        names = [str(node.target) for node in nodes if node.op == "placeholder"]
        return program.functions[function](**{name: given[name] for name in names})

    @staticmethod
    def _momentum_arguments(spec: UpdateSpec) -> list[str]:
        """Arguments for the momentum of the scalings that step by a vector."""
        kept = [scaling for scaling in spec.scalings if scaling in VECTOR_RULES]
        return [spec.option("momentum", scaling) for scaling in kept if scaling in spec.momentum]

    def _present(self, gradients: Mapping[str, Tensor]) -> UpdateSpec:
        """The spec for the parameters that have a gradient in this step."""
        generic = tuple(g for g in self.spec.generic if g.name in gradients)
        partial = any(p not in gradients for block in self.blocks for p in block.parameters)
        if len(generic) == len(self.spec.generic) and not partial:
            return self.spec
        held = {g.name for g in generic} | {p for b in self.blocks for p in b.parameters}
        masters = tuple(name for name in self.spec.masters if name in held)
        return replace(self.spec, generic=generic, partial=partial, masters=masters)

    def _placed(self, name: str, value: Tensor, *, wide: bool) -> Tensor:
        """A state tensor on its parameter's device, in its dtype or, ``wide``, at least float32."""
        own = self.parameters[name]
        dtype = torch.promote_types(own.dtype, torch.float32) if wide else own.dtype
        return value.detach().to(own.device, dtype)

    def _without_gradient(self, gradients: Mapping[str, Tensor]) -> set[str]:
        """Parameters of blocks that lack a gradient: the whole block stays as it is."""
        return {
            name
            for block in self.blocks
            if any(p not in gradients for p in block.parameters)
            for name in block.parameters
        }

    def _lists(self, spec: UpdateSpec, given: Mapping[str, Any]) -> dict[str, Any]:
        """State of the generic parameters and of the average, as the lists the code takes."""
        for parameter in spec.generic:
            if parameter.name not in self.generic:
                gradient = self._placed(
                    parameter.name, given["gradients"][parameter.name], wide=True
                )
                moments = moments_at_start(spec, gradient, given["generic_momentum"], given["step"])
                self.generic[parameter.name] = dict(zip(GENERIC_STATE, moments, strict=True))
        if spec.average:
            for name in spec.parameters:
                own = self._placed(name, self.parameters[name], wide=name in spec.masters)
                self.average.setdefault(name, own.clone())
        lists: dict[str, Any] = {
            name: [self.generic[p.name][name] for p in spec.generic] for name in GENERIC_STATE
        }
        lists["average"] = [self.average[name] for name in spec.parameters if spec.average]
        return lists

    def _filled(
        self, gradients: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Zeros for missing gradients, and by stack which entries have none missing."""
        filled, active = dict(gradients), {}
        for stack in self.spec.stacks:
            flags: list[bool] = []
            for block in stack.blocks:
                present = all(name in gradients for name in block.parameters)
                flags += [present] * block.groups
                for name in block.parameters:
                    filled.setdefault(name, torch.zeros_like(self.parameters[name]))
            active[stack.key] = torch.tensor(flags, device=stack.device)[:, None, None]
        return filled, active

    def _commit(self, spec: UpdateSpec, returned: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(returned)
        report: dict[str, Any] = {
            name: result.pop(name) for name in ("nu", "clip_scale") if name in result
        }
        for name in GENERIC_STATE:
            for parameter, value in zip(spec.generic, result.pop(name, ()), strict=False):
                self.generic[parameter.name][name] = value
        for name, value in zip(spec.parameters, result.pop("average", ()), strict=False):
            self.average[name] = value
        self.state |= result
        return report

    def _failed_blocks(self, failed: Mapping[str, Sequence[Tensor]]) -> list[str]:
        """Names of blocks with a failure; one synchronisation for all stacks."""
        first = self.spec.stacks[0].device
        merged = {key: torch.stack(list(flags)).any(0) for key, flags in failed.items()}
        flat = torch.cat([flags.to(first) for flags in merged.values()]).tolist()
        if not any(flat):
            return []
        names: list[str] = []
        start = 0
        for stack in self.spec.stacks:
            names += _names_of(stack, flat[start : start + stack.depth])
            start += stack.depth
        return names


def _names_of(stack: StackSpec, flags: Sequence[bool]) -> list[str]:
    return [name for name, (start, stop) in stack.spans.items() if any(flags[start:stop])]
