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
from kfc_fx.distributed.generic_rows import GenericRows
from kfc_fx.distributed.owners import owners_of
from kfc_fx.distributed.packing import Slot
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.sharded_state import ShardedState
from kfc_fx.distributed.shards import Sharding, is_sharded, locals_of
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
    these. Of a large parameter without a block every rank owns some rows. One collective brings all
    steps to all ranks. Weight decay, averages, copies in single precision and small parameters
    without a block are updated everywhere, by a program of their own.

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
        self.spec = spec
        self._ranks = ranks
        self.owners: Mapping[str, int] = owners_of(spec, ranks.count, tuple(sorted(owners.items())))
        """The rank that owns each block."""
        self._plan = {block.name: block.as_dict() for block in self.blocks}
        joined = [block.name for block in self.blocks if not _is_known(block, saved)]
        self.waiting: bool = bool(joined) or saved.waiting
        """Whether there are blocks without statistics, on any rank."""
        self.started: bool = saved.started and not joined
        self._written_out = False
        part = part_of(spec, {name for name, owner in self.owners.items() if owner == ranks.rank})
        self.is_sharded: bool = is_sharded(parameters.values())
        """Whether parameters are, so that gradients come to their owners by :meth:`receive`."""
        self.rows: GenericRows | None = None
        """Of parameters without a block; None where these step on their shards."""
        if not self.is_sharded:
            self.rows = GenericRows(spec, parameters, saved.generic, ranks)
        divided = self.rows.shardings if self.rows else {}
        part = replace(
            part,
            generic=self.rows.own if self.rows else (),
            weight_decay=False,
            average=False,
            master_weights=(),
            clip="shared" if part.clip == "factors" else part.clip,
        )
        layouts = _layouts(spec, self.owners, divided, ranks.count)
        dtypes = [getattr(torch, stack.dtype) for stack in spec.stacks]
        dtypes += [parameters[name].dtype for name in divided]
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        device = torch.device(spec.stacks[0].device)
        self._exchange: StepExchange
        if self.rows is None:
            self._exchange = ShardedSteps(layouts, parameters, ranks, dtype, device)
            saved = ShardedState(parameters).local_state(saved)
        else:
            self._exchange = ReplicatedSteps(layouts, self.rows, ranks, dtype, device)
            saved = replace(saved, generic=self.rows.local(saved.generic))
        self._own: UpdateEngine | None = None
        self.anew: list[str] = []
        """Blocks of this rank that there is no state of, or not what is kept of them now."""
        if part.stacks or part.generic:
            own_momenta = None if momenta is None else self._momenta_of(part, momenta)
            steps = self._exchange.steps
            self._own = UpdateEngine(part, saved, steps, compiled=compiled, momenta=own_momenta)
            self._own.waiting, self._own.started = self.waiting, self.started
            self.anew = self._own.anew
        rest = replace(
            spec,
            given_steps=True,
            given_generic=tuple(divided),
            generic=tuple(own for own in spec.generic if own.name not in divided),
        )
        everywhere = {n: entry for n, entry in saved.generic.items() if n not in divided}
        left, held = replace(saved, generic=everywhere), locals_of(parameters)
        self._rest = UpdateEngine(rest, left, held, compiled=compiled, momenta=momenta)
        self._still = {
            name: entry
            for name, entry in everywhere.items()
            if self.rows and name in self.rows.known
        }
        """This rank's rows of moments of parameters that are not updated now."""
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
        own = self._own.held() if self._own else SavedState.empty()
        rest = self._rest.held()
        elsewhere = {
            block.name: self._names_held(stack)
            for stack in self.spec.stacks
            for block in stack.blocks
            if self.owners[block.name] != self._ranks.rank
        }
        generic = {**self._still, **rest.generic, **own.generic}
        return replace(
            rest,
            blocks=own.blocks,
            generic=self.rows.distributed(generic) if self.rows else generic,
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
        if statistics.rate:
            assert self._own is not None
            self._own.accumulate(statistics)
        self.waiting, self._written_out = False, True

    def can_refresh(self, stacks: Collection[str] | None = None) -> bool:
        """Whether there may be statistics that a refresh would make something new of."""
        return True

    def refresh(self, options: OptionNumbers, stacks: Collection[str] | None = None) -> list[str]:
        """Factors of this rank's blocks into inverses, bases or whitening matrices; returns the
        blocks for which that failed.

        Args:
            stacks: keys of those to refresh; None for all.
        """
        failed: list[str] = []
        held = {stack.key for stack in self.held_stacks}
        if held if stacks is None else held.intersection(stacks):
            assert self._own is not None
            failed = self._own.refresh(options, stacks)
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
        if self.rows is not None:
            without = self.rows.shardings.keys() - gradients.keys()
            steps = {name: step for name, step in steps.items() if name not in without}
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
            if self._own and (own or self.held_stacks):
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
        return Momenta(stacks, {own.name: momenta.generic[own.name] for own in part.generic})

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


def _layouts(
    spec: UpdateSpec, owners: Mapping[str, int], divided: Mapping[str, Sharding], ranks: int
) -> list[dict[str, Slot]]:
    """The parameters whose steps each rank sends."""
    layouts: list[dict[str, Slot]] = [{} for _ in range(ranks)]
    for stack in spec.stacks:
        for block in stack.blocks:
            shapes = {block.weight: block.weight_shape}
            if block.bias is not None:
                shapes[block.bias] = block.bias_shape
            layouts[owners[block.name]] |= {name: Slot(shape) for name, shape in shapes.items()}
    for name, sharding in divided.items():
        for rank, layout in enumerate(layouts):
            layout[name] = Slot(sharding.shape_of(rank))
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
