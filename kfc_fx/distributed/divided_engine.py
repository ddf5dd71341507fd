"""An engine that has the state of the blocks that its rank owns, and takes their steps for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfc_fx.codegen.part import part_of
from kfc_fx.codegen.scalings.rules import steps_by_vector
from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.owners import owners_of
from kfc_fx.distributed.packing import Slot
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.sharded_state import ShardedState
from kfc_fx.distributed.shards import is_sharded, locals_of
from kfc_fx.distributed.step_exchange import ReplicatedSteps, ShardedSteps, StepExchange
from kfc_fx.engine.engine import UpdateEngine
from kfc_fx.engine.factors import Factors
from kfc_fx.engine.screening import ScreenedStatistics
from kfc_fx.engine.state import SavedState, entries_of, state_entries
from kfc_fx.engine.step_inputs import Momenta, Number, OptionNumbers, StepNumbers
from kfc_fx.errors import OptionError
from kfc_fx.plan.spec import BlockSpec


class _StopsHereError(Exception):
    """Another rank has failed, in the middle of a step."""


class DividedEngine:
    """State and steps of the blocks that this rank owns, and the update of everything else.

    An owner computes the steps of its blocks and no others, by a program that was generated for
    these. One collective brings all steps to all ranks. Weight decay, averages, copies in single
    precision and parameters without a block are updated everywhere, by a program of their own.

    Args:
        spec: of the whole update.
        saved: what it starts from; of other ranks' blocks it may have nothing.
        owners: ranks of blocks that have owners already.
    """

    def __init__(
        self,
        spec: UpdateSpec,
        saved: SavedState,
        parameters: Mapping[str, Tensor],
        ranks: Ranks,
        owners: Mapping[str, int],
        *,
        compiled: bool = False,
        momenta: Momenta | None = None,
    ) -> None:
        _check_one_device(spec)
        self.spec, self._ranks = spec, ranks
        self.owners = owners_of(spec, ranks.count, tuple(sorted(owners.items())))
        """The rank that owns each block."""
        self._plan = {block.name: block.as_dict() for block in self.blocks}
        joined = [block.name for block in self.blocks if not _is_known(block, saved)]
        self.waiting = bool(joined) or saved.waiting
        """Whether there are blocks without statistics, on any rank."""
        self.started = saved.started and not joined
        self._written_out = False
        part = part_of(spec, {name for name, owner in self.owners.items() if owner == ranks.rank})
        clip = "shared" if part.clip == "factors" else part.clip
        part = replace(
            part, generic=(), weight_decay=False, average=False, master_weights=(), clip=clip
        )
        layouts = _layouts(spec, self.owners, ranks.count)
        dtypes = [getattr(torch, stack.dtype) for stack in spec.stacks]
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        device = torch.device(spec.stacks[0].device)
        self.is_sharded = is_sharded(parameters.values())
        """Whether parameters are, so that gradients come to their owners by :meth:`receive`."""
        self._exchange: StepExchange
        if self.is_sharded:
            self._exchange = ShardedSteps(layouts, parameters, ranks, dtype, device)
            saved = ShardedState(parameters).local_state(saved)
        else:
            self._exchange = ReplicatedSteps(layouts, ranks, dtype, device)
        self._own: UpdateEngine | None = None
        self.anew: list[str] = []
        """Blocks of this rank that there is no state of, or not what is kept of them now."""
        if part.stacks:
            own_momenta = None if momenta is None else self._momenta_of(part, momenta)
            steps = self._exchange.steps
            self._own = UpdateEngine(part, saved, steps, compiled=compiled, momenta=own_momenta)
            self._own.waiting, self._own.started = self.waiting, self.started
            self.anew = self._own.anew
        rest, held = replace(spec, given_steps=True), locals_of(parameters)
        self._rest = UpdateEngine(rest, saved, held, compiled=compiled, momenta=momenta)
        self._rates: tuple[object, dict[str, Tensor]] = (None, {})

    # -- what there is -----------------------------------------------------------------------

    @property
    def blocks(self) -> list[BlockSpec]:
        """Those of all ranks."""
        return [block for stack in self.spec.stacks for block in stack.blocks]

    @property
    def held_stacks(self) -> tuple[StackSpec, ...]:
        """Stacks of this rank's blocks."""
        return self._own.spec.stacks if self._own else ()

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Every parameter by name."""
        return self._rest.parameters

    @property
    def average(self) -> dict[str, Tensor]:
        """Polyak averages by name."""
        return self._rest.average

    @property
    def source(self) -> str:
        """The text of this rank's programs."""
        own = [self._own.source] if self._own else []
        return "\n\n".join([*own, self._rest.source])

    def factors(self, block: str) -> Factors:
        """Bias-corrected factors of a block of this rank."""
        assert self._own is not None
        return self._own.factors(block)

    def held(self) -> SavedState:
        """The state by name; of blocks of other ranks what they hold."""
        blocks: Mapping[str, dict[str, Tensor]] = self._own.held().blocks if self._own else {}
        elsewhere = {
            block.name: self._names_held(stack)
            for stack in self.spec.stacks
            for block in stack.blocks
            if self.owners[block.name] != self._ranks.rank
        }
        return replace(
            self._rest.held(),
            blocks=blocks,
            plan=dict(self._plan),
            started=self.started,
            waiting=self.waiting,
            elsewhere=elsewhere,
        )

    def _names_held(self, stack: StackSpec) -> tuple[str, ...]:
        written = self.spec.factors_in_basis_of(stack) if self._written_out else ()
        return tuple(sorted({*state_entries(self.spec, stack), *written}))

    # -- a step ------------------------------------------------------------------------------

    def accumulate(self, statistics: ScreenedStatistics) -> None:
        """New statistics into the EMA of this rank's factors."""
        if self._own:
            self._own.accumulate(statistics)
        self.waiting, self._written_out = False, True

    @property
    def can_refresh(self) -> bool:
        """Whether there may be statistics that a refresh would make something new of."""
        return True

    def refresh(self, options: OptionNumbers) -> list[str]:
        """Factors of this rank's blocks into inverses, bases or whitening matrices; returns the
        blocks for which that failed."""
        failed: list[str] = []
        if self._own:
            failed = self._own.refresh(options)
            self._own.state = {
                key: {name: value.contiguous() for name, value in own.items()}
                for key, own in self._own.state.items()
            }
        self._written_out, self.started = False, not self.waiting
        return failed

    def receive(self, gradients: Mapping[str, Tensor], attempt: Attempt) -> bool:
        """Bring gradients to their owners, where parameters are sharded; returns whether all are
        finite, on all ranks.

        Raises:
            StepError: something has failed on another rank.
        """
        return self._exchange.receive(gradients, attempt)

    def apply(
        self, gradients: Mapping[str, Tensor], numbers: StepNumbers, attempt: Attempt
    ) -> dict[str, Tensor]:
        """One step of all ranks; returns what it reports, ν and the clip scale.

        Args:
            gradients: by name: whole and the same on all ranks, or this rank's shards.
            numbers: of the whole update.
            attempt: what has failed in this step so far.

        Raises:
            StepError: something has failed on another rank.
        """
        report, steps = self._steps(gradients, numbers, attempt)
        self._rest.apply(locals_of(gradients), numbers, _no_scales, steps=steps)
        return report

    def _steps(
        self, gradients: Mapping[str, Tensor], numbers: StepNumbers, attempt: Attempt
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the step reports, and the steps of all blocks by parameter name."""
        found: list[Tensor] = []
        stopped = False

        def whole(part: Tensor) -> dict[str, Tensor]:
            nonlocal stopped
            total, stopped = self._added(part, failed=False)
            found.append(total)
            if stopped:
                raise _StopsHereError
            return {"nu": total.to(part)}

        report: dict[str, Tensor] = {}
        with attempt.local():
            attempt.raise_own()
            own = self._exchange.owned(gradients)
            if self._own:
                torch._foreach_zero_(list(self._exchange.steps.values()))
                with suppress(_StopsHereError):
                    report = self._own.apply(own, self._numbers_of(numbers), whole)
        if self._has_nu and not found:
            zero = torch.zeros((), device=self.spec.stacks[0].device)
            total, stopped = self._added(zero, failed=attempt.failed)
            report = {"nu": total}
        if stopped:
            attempt.vote()
        return report, self._exchange.send(attempt)

    def _added(self, part: Tensor, *, failed: bool) -> tuple[Tensor, bool]:
        """ν of all ranks, and whether one has failed."""
        part = part.double()  # as every rank has it, whatever the dtype of its blocks
        flag = torch.full_like(part, float(failed))
        total = self._ranks.add(torch.stack([part, flag]))
        return total[0], bool(total[1])

    @property
    def _has_nu(self) -> bool:
        vectors = any(steps_by_vector(stack.scaling.generator) for stack in self.spec.stacks)
        return self.spec.clip == "factors" and vectors

    def _numbers_of(self, numbers: StepNumbers) -> StepNumbers:
        """The numbers of this rank's part."""
        assert self._own is not None
        spec = self._own.spec
        if self._rates[0] is not numbers.rates:
            self._rates = (numbers.rates, dict(self._columns(spec, numbers.rates)))
        momenta = self._momenta_of(spec, numbers.momenta)
        return replace(numbers, rates=self._rates[1], momenta=momenta)

    def _momenta_of(self, part: UpdateSpec, momenta: Momenta) -> Momenta:
        stacks: dict[str, Number] = {}
        for stack in part.stacks:
            own = momenta.stacks[stack.key]
            is_column = isinstance(own, Tensor)
            stacks[stack.key] = self._column(stack, own) if is_column else own  # type: ignore[arg-type]
        return Momenta(stacks, {})

    def _columns(
        self, part: UpdateSpec, values: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        for stack in part.stacks:
            yield stack.key, self._column(stack, values[stack.key])

    def _column(self, part: StackSpec, column: Tensor) -> Tensor:
        """The entries of a column of a whole stack that are a part's."""
        whole = next(stack for stack in self.spec.stacks if stack.key == part.key)
        spans = [whole.spans[block.name] for block in part.blocks]
        return torch.cat([entries_of(column, whole, span) for span in spans])

    # -- as any engine -----------------------------------------------------------------------

    def guards(self, gradients: Mapping[str, Tensor], momenta: Momenta) -> bool:
        """No: whether gradients are finite is looked at before."""
        return False

    def take_skipped(self) -> int:
        """None: a step that is not to be taken is not begun."""
        return 0

    def take_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Update these tensors from now on, by the same names."""
        self._rest.take_parameters(locals_of(parameters))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Put the state back as it was if the body raises."""
        before = self.started, self.waiting, self._written_out
        engines = [engine for engine in (self._own, self._rest) if engine]
        held: Callable[[], Any] = engines[0].transaction
        try:
            with held(), engines[-1].transaction():
                yield
        except BaseException:
            self.started, self.waiting, self._written_out = before
            raise


def _is_known(block: BlockSpec, saved: SavedState) -> bool:
    """Whether some rank has the state of a block, and not of one of another size in its place."""
    known = saved.plan.get(block.name)
    return known is not None and tuple(known["weight_shape"]) == block.weight_shape


def _layouts(spec: UpdateSpec, owners: Mapping[str, int], ranks: int) -> list[dict[str, Slot]]:
    """The parameters whose steps each rank sends."""
    layouts: list[dict[str, Slot]] = [{} for _ in range(ranks)]
    for stack in spec.stacks:
        for block in stack.blocks:
            shapes = {block.weight: block.weight_shape}
            if block.bias is not None:
                shapes[block.bias] = block.bias_shape
            layouts[owners[block.name]] |= {name: Slot(shape) for name, shape in shapes.items()}
    return layouts


def _no_scales(*_: Any) -> dict[str, Tensor]:
    raise AssertionError("an update whose steps are given does not pause")


def _check_one_device(spec: UpdateSpec) -> None:
    devices: Collection[str] = {stack.device for stack in spec.stacks}
    if len(devices) > 1:
        raise OptionError(
            "distribute='update' needs the blocks of a rank on one device, and these are on "
            f"{', '.join(sorted(devices))}: use distribute='refresh'"
        )
