"""One compiled model in an optimizer: its statistics, its engine, its counters, its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfc_fx.capture.wrappers import refuse_tensor_parallel
from kfc_fx.codegen.part import of_stacks
from kfc_fx.compilation import Compilation
from kfc_fx.distributed.divided_engine import DividedEngine
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.sharded_state import ShardedState
from kfc_fx.distributed.shared_step import SharedStep
from kfc_fx.engine.engine import UpdateEngine
from kfc_fx.engine.screening import screen
from kfc_fx.engine.state import SavedState
from kfc_fx.engine.step_inputs import OptionNumbers, StepNumbers
from kfc_fx.errors import StatisticsError, StepError, warn
from kfc_fx.optim.binding import Binding
from kfc_fx.optim.diagnostics import Diagnostics
from kfc_fx.optim.dues import Dues
from kfc_fx.optim.engines import Engine
from kfc_fx.optim.exact_fisher import ExactFisher
from kfc_fx.optim.gradients import all_finite, named_gradients, relative_distance
from kfc_fx.optim.groups import Group
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.put_back import put_back_if_raised
from kfc_fx.optim.rates import generic_numbers, option_numbers, warm_up_share
from kfc_fx.optim.request import check_model, request_of
from kfc_fx.optim.schedule import Schedule
from kfc_fx.optim.states.entries import Entries, parameter_entries
from kfc_fx.optim.states.state_dict import Place
from kfc_fx.statistics.collector import Collector
from kfc_fx.statistics.inputs import inputs_of
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.loss_pass import UNDECIDED
from kfc_fx.statistics.sums import Sums

DROPPED = "has a statistic that is not finite: it is dropped, the last good factor stays"
NOT_FINITE = "a gradient is not finite"
UNDECOMPOSED = "has a factor that cannot be decomposed: the identity takes its place"

Groups = Sequence[Group]


class ModelStep:
    """What an optimizer does with one of its compiled models.

    Methods take the optimizer's ``param_groups``, which belong to it and may change at any time.

    Args:
        outside: parameters of no compiled model by name, which are generic ones of this.
        number: of the model among the optimizer's.
        ranks: that train it.

    Raises:
        OptionError: options do not go with the model or its backend.
    """

    def __init__(
        self,
        compilation: Compilation,
        options: KFCOptions,
        outside: Mapping[str, Tensor],
        number: int,
        ranks: Ranks,
    ) -> None:
        check_model(compilation, options)
        refuse_tensor_parallel(compilation.model)
        compilation.names.refresh_if_changed()
        self.compilation = compilation
        self.number = number
        self._options = options
        self._ranks = ranks
        self.binding: Binding = Binding(compilation, options, ranks, outside)
        self.collector: Collector = compilation.attach(request_of(compilation, options), ())
        self._dues = Dues(options, by_block=compilation.options.backend == "eager")
        self._diagnostics = self._fresh_diagnostics()
        self.exact: ExactFisher = ExactFisher(
            compilation, self.collector, options, self._diagnostics
        )
        self._last_step_ended: float | None = None
        self._owned: object = None
        self._warned: set[str] = set()

    def _fresh_diagnostics(self) -> Diagnostics:
        return Diagnostics(damping=getattr(self._options.scaling, "damping", None))

    @property
    def schedule(self) -> Schedule:
        """When statistics and refreshes are due."""
        return self._dues.schedule

    # -- around steps ------------------------------------------------------------------------

    def train(self, groups_of: Callable[[], Groups]) -> None:
        """Say where the optimizer's groups are found in a forward pass."""
        self.collector.trained = lambda: {id(p) for g in groups_of() for p in g["params"]}

    def own(self, groups: Groups) -> None:
        """Take the statistics of these groups' parameters from now on."""
        self.compilation.assign(self.collector, self.binding.of_model(groups))

    def engine(self, groups: Groups) -> Engine:
        """What runs the generated update: its spec, its state and its programs."""
        return self.binding.engine(groups)

    @property
    def diagnostics(self) -> Diagnostics:
        """Counters, timings and last values; reading it may wait for the device."""
        engine = self.binding.current
        if engine is None or self._ranks.several:
            return self._diagnostics  # of several ranks one alone may look
        if self._settle(engine):
            self.arm()
        return self._diagnostics

    def begin(self, groups: Groups) -> None:
        """Let the state be in the engine that the next step runs, where the plan is known: of
        blocks of other ranks there is none from then on."""
        binding = self.binding
        binding.follow()
        if binding.current is None and self.compilation.captured and self.compilation.plan.blocks:
            binding.engine(groups)

    def entries(self, groups: Groups) -> Entries:
        """The state by parameter name; empty before the plan is known."""
        self.begin(groups)
        binding = self.binding
        own = binding.by_name(groups)
        known, sharded = binding.has_state, ShardedState(binding.parameters)
        options = self._options
        return parameter_entries(
            binding.held(),
            {name: p for name, p in binding.parameters.items() if name in own and known},
            model=self.number,
            steps=self._diagnostics.steps,
            average=options.average is not None,
            master_weights=options.master_weights,
            whole=_as_it_is if binding.consolidated.is_whole else sharded.whole,
        )

    def record(self, groups: Groups) -> dict[str, Any]:
        """What is of no parameter, as plain data for a state dict."""
        counters = self.diagnostics.counters()
        state = self.binding.held()
        return {
            "started": state.started,
            "waiting": state.waiting,
            "since": state.since,
            "counters": counters,
            "likelihood": self.collector.choice.state(),
            "seed": self.collector.seed,
            "most": dict(self.schedule.most),
            "entries": len(self.entries(groups)),
        }

    def place(self, groups: Groups) -> Place:
        """The model as a state is loaded into it."""
        self.binding.follow()
        names = {name: p for p, name in self.binding.names.items()}
        own = {names[name]: name for name in self.binding.by_name(groups)}
        return Place(own, self.binding.parameters, self.binding.divided)

    def load(self, state: SavedState, record: Mapping[str, Any]) -> None:
        """Continue from what :meth:`entries` and :meth:`record` gave."""
        self.binding.load(state)
        self.diagnostics.restore(record["counters"])
        self.collector.choice.restore(record["likelihood"])
        self.collector.draw_from(record["seed"])
        self._dues.schedule = replace(self.schedule, most=record["most"])
        self.collector.take()
        self.arm()

    def restart(self) -> None:
        """Begin anew, without any state."""
        self.binding.take_over(SavedState.empty())
        self._diagnostics.restore(self._fresh_diagnostics().counters())
        self._dues.schedule = replace(self.schedule, most={})
        self.collector.take()
        self.arm()

    def adopt(self, entries: Mapping[Tensor, tuple[Tensor, Tensor, int]]) -> None:
        """Take over moments by parameter, and the count of steps.

        Args:
            entries: parameter to its first and second moment and its count of steps.
        """
        names = self.binding.names
        own = {names[p]: entry for p, entry in entries.items() if p in names}
        if not own:
            return
        saved = self.binding.held()
        saved.generic |= {name: {"m": m.clone(), "v": v.clone()} for name, (m, v, _) in own.items()}
        self.binding.take_over(saved)
        self._diagnostics.steps = max(count for *_, count in own.values())
        self.collector.arm(number=self._diagnostics.statistics_steps)

    def arm(self) -> None:
        """Let the next forward pass emit, if statistics are due at the next step, or there are
        blocks without any, which have joined since the last."""
        engine = self.binding.current
        waiting = engine is not None and engine.waiting
        self.collector.join(self._ranks.rank, self._ranks.count)
        step = self._diagnostics.steps
        due = self._dues.any_statistics(engine, step) or waiting
        left_out = self._dues.left_out(engine, step) if due else frozenset[str]()
        self.collector.arm(due, self._diagnostics.statistics_steps, left_out)

    def collect(self, batches: Iterable[Any]) -> None:
        """Take the statistics of some batches.

        Raises:
            StatisticsError: there was none.
        """
        self.collector.take()
        self.collector.arm(self.collector.armed, self._diagnostics.statistics_steps)
        for batch in batches:
            args, kwargs = inputs_of(batch)
            self.compilation.collect_statistics(self.collector, *args, **kwargs)
        if not self.collector.sums.blocks:
            raise StatisticsError("initialize got no batch with statistics; pass at least one")

    def initialize(self, groups: Groups, shared: SharedStep | None) -> None:
        """Make factors of what was collected, on all ranks together."""
        engine = self.engine(groups)
        with torch.no_grad(), self.transaction(engine):
            self.use_statistics(engine, shared, everything=True)
            if shared is not None:
                shared.attempt.vote()
        self.collector.take()
        self.arm()

    # -- one step ----------------------------------------------------------------------------

    def check_owner(self, groups: Groups) -> None:
        """Raise :class:`StepError` where the model's statistics are another optimizer's by now."""
        if not self.compilation.known_to_model:
            raise StepError(
                "the model was compiled anew, or uncompiled, after this KFC was made: make a KFC "
                "for the model as it is now"
            )
        changed = self.binding.follow()
        listed = tuple(tuple(map(id, group["params"])) for group in groups)
        key = (self.compilation.assignments, listed)
        if self._owned == key and not changed:
            return
        if changed or (self._owned is not None and self._owned != key):
            self._own_new(groups)
            self.compilation.take_entries()
            key = (self.compilation.assignments, listed)
        owner_of = self.compilation.owner_of
        for name in self.binding.of_model(groups):
            if owner_of(name) is not self.collector:
                raise StepError(f"another KFC was made for {name}; step that one")
        self._owned = key

    def _own_new(self, groups: Groups) -> None:
        """Take the statistics of parameters that nobody has: they have joined the model, or have
        another name by now."""
        names = self.binding.of_model(groups)
        new = [name for name in names if self.compilation.owner_of(name) is None]
        if new:
            self.compilation.names.refresh_if_changed()
            self.compilation.assign(self.collector, new)

    def gradients(self, groups: Groups) -> dict[str, Tensor]:
        """The gradients that there are of what is minimized, by parameter name."""
        names = self.binding.names
        gradients = named_gradients(groups, names, maximize=self._options.maximize)
        if gradients and self.collector.armed and not self._ranks.several:
            self.compilation.note_gradients(gradients)  # of one rank, others may have given them
        return gradients

    def counts(self) -> dict[str, int]:
        """How many steps, statistics and refreshes there were."""
        own = self._diagnostics
        return {
            "steps": own.steps,
            "statistics": own.statistics_steps,
            "refreshes": own.refreshes,
        }

    def may_step(
        self,
        engine: Engine,
        gradients: Mapping[str, Tensor],
        groups: Groups,
        shared: SharedStep | None,
    ) -> bool:
        """Whether gradients are finite, as far as the step does not look itself. Those of sharded
        parameters come to the owners of their blocks here."""
        momenta = self.binding.momenta(engine, groups)
        if isinstance(engine, DividedEngine) and engine.is_sharded:
            assert shared is not None
            finite = engine.receive(gradients, shared.attempt)
            return finite and not self.is_without_likelihood
        if self.is_without_likelihood:
            return False
        return engine.guards(gradients, momenta) or all_finite(gradients.values())

    def skip(self) -> None:
        """Take no step; the statistics go with the gradients."""
        self._note_skipped(1, UNDECIDED if self.is_without_likelihood else NOT_FINITE)
        self.collector.take()

    @property
    def is_without_likelihood(self) -> bool:
        """Whether the loss has told nothing of its likelihood yet, for want of a gradient."""
        return self.collector.likelihood is None and self.collector.missing == UNDECIDED

    @contextmanager
    def step_size_noted(self, engine: Engine, gradients: Mapping[str, Tensor]) -> Iterator[None]:
        """Keep how far the step in the body goes, where a refresh waits for the device anyway. The
        parameters are put back as they were if that fails, or the body does."""
        if not self.schedule.refresh_due(self._diagnostics.steps):
            yield
            return
        self._settle(engine)
        own = [engine.parameters[name].detach() for name in gradients]
        with put_back_if_raised(own) as before:
            yield
            self._diagnostics.note_step(relative_distance(before, own))

    @contextmanager
    def transaction(self, engine: Engine) -> Iterator[None]:
        """Put state and counters back as they were if the body raises."""
        self._note_gradient_time()
        schedule = self.schedule
        try:
            with engine.transaction(), self._diagnostics.transaction():
                yield
        except BaseException:
            self._dues.schedule = schedule
            raise

    def use_statistics(
        self, engine: Engine, shared: SharedStep | None = None, *, everything: bool = False
    ) -> None:
        """Statistics into factors, and factors into inverses or bases, where they are due.

        Args:
            shared: the step of all ranks, where there are several.
            everything: take all stacks for due.
        """
        step, diagnostics = self._diagnostics.steps, self._diagnostics
        everything = everything or self._dues.all_due(engine)
        keys = frozenset(stack.key for stack in engine.spec.stacks)
        counted = keys if everything else self._dues.of_statistics(engine, step)
        sums = self.collector.sums
        sums.drop_lost()
        incomplete = everything and bool(self.collector.left_out)
        if incomplete:  # blocks have joined since the forward pass: the next one takes those of all
            sums = Sums()
        if shared is not None and shared.has_statistics and counted:
            with diagnostics.timed("statistics"):
                sums = shared.summed(sums, of_stacks(engine.spec, counted))
        if everything and sums.blocks:
            self._dues.share_out(engine.spec, sums, self.collector)
        can_refresh = bool(sums.blocks) or engine.can_refresh()  # alike on all ranks, unlike later
        with shared.attempt.local() if shared else nullcontext():
            self._accumulate(engine, sums, step, counted, may_lack=incomplete)
        waiting = engine.waiting and not sums.blocks
        at_once = engine.spec.factors_in_basis and bool(sums.blocks)
        stacks = keys if everything else self._dues.of_refresh(engine, step)
        if at_once:
            stacks = counted
        settled = isinstance(engine, DividedEngine)  # by the collective that brings the steps
        due = not engine.started or at_once or self.schedule.refresh_due(step)
        if due and stacks and not waiting and can_refresh:  # else there is nothing to make bases of
            options = self._option_numbers(engine)
            with diagnostics.timed("refresh"):
                failed = self._refreshed(engine, options, shared, stacks)
            diagnostics.count("inverse_failures", failed, UNDECOMPOSED)
            diagnostics.refreshes += 1
            settled = settled or self._options.distribute == "refresh"
        if shared is not None and shared.has_statistics and not settled:
            shared.attempt.vote()  # the others would take the step

    def _refreshed(
        self,
        engine: Engine,
        options: OptionNumbers,
        shared: SharedStep | None,
        stacks: Collection[str],
    ) -> list[str]:
        """Refresh stacks; returns the blocks for which that failed."""
        if shared is None:
            return engine.refresh(options, stacks)
        divides = shared.has_statistics and self._options.distribute == "refresh"
        if divides and isinstance(engine, UpdateEngine):
            return shared.refreshed(engine, of_stacks(engine.spec, stacks), options)
        with shared.attempt.local():
            return engine.refresh(options, stacks)
        return []

    def _accumulate(
        self,
        engine: Engine,
        sums: Sums,
        step: int,
        stacks: Collection[str],
        *,
        may_lack: bool,
    ) -> None:
        diagnostics = self._diagnostics
        if sums.blocks:
            count = diagnostics.statistics_steps
            held = [stack for stack in engine.held_stacks if stack.key in stacks]
            screened = screen(sums, held, lambda stack: self._dues.rate(stack, step, count))
            diagnostics.count("dropped_statistics", screened.dropped, DROPPED)
            with diagnostics.timed("statistics"):
                engine.accumulate(screened)
            diagnostics.statistics_steps += 1
        lacks = not sums.blocks or bool(self.collector.missing)
        if self.collector.armed and lacks and not (may_lack or self.collector.may_lack):
            self._note_missed(step, some=bool(sums.blocks))

    def apply(
        self,
        engine: Engine,
        gradients: Mapping[str, Tensor],
        groups: Groups,
        shared: SharedStep | None,
    ) -> None:
        """Gradients into parameters."""
        with self._diagnostics.timed("update"):
            numbers = self._numbers(engine, groups)
            if isinstance(engine, DividedEngine):
                assert shared is not None
                report = engine.apply(gradients, numbers, shared.attempt)
            else:
                scales_of = partial(self.exact.scales, gradients)
                report = engine.apply(gradients, numbers, scales_of)
        self._diagnostics.last_nu = report.get("nu")
        self._diagnostics.last_clip_scale = report.get("clip_scale")
        self._diagnostics.steps += 1

    def end(self) -> None:
        """Begin the way to the next step."""
        self.binding.note_step()
        self.collector.take()
        self.arm()
        self._last_step_ended = time.perf_counter()

    # -- of a step ---------------------------------------------------------------------------

    def _settle(self, engine: Engine) -> int:
        """Count the steps that the device did not take as skipped; returns how many."""
        skipped = engine.take_skipped()
        self._diagnostics.steps -= skipped
        if skipped:
            self._note_skipped(skipped, NOT_FINITE)
        return skipped

    def _note_skipped(self, count: int, why: str) -> None:
        before = self._diagnostics.skipped_steps
        self._diagnostics.skipped_steps += count
        if not before:
            warn(
                f"{why}: the step is skipped, parameters and state stay "
                "(opt.diagnostics.skipped_steps counts these)"
            )

    def _note_gradient_time(self) -> None:
        """Share the time since the last step between the gradient and the statistics in it."""
        seconds, statistics = self._diagnostics.seconds, self.collector.take_seconds()
        seconds["statistics"] += statistics  # type: ignore[assignment]
        if self._last_step_ended is not None:
            between = time.perf_counter() - self._last_step_ended
            seconds["gradient"] += between - statistics  # type: ignore[assignment]

    def _note_missed(self, step: int, *, some: bool) -> None:
        """Count a due step that has no statistics, and warn of each reason once.

        Args:
            some: whether another backward pass, or another rank, gave any.

        Raises:
            StatisticsError: no step has had any yet, so that there are no factors to go on with.
        """
        reason = self.collector.take_missing()
        if not reason and self.collector.taking:
            reason = (
                "the step is taken within the backward pass that they are taken in: pass "
                "statistics=kfc_fx.Statistics(fisher='sampled'), whose pass comes before"
            )
        if not reason:
            reason = self.compilation.why_not_called
            compiled = self.compilation.options.backend != "eager"
            request, likelihood = self.collector.request, self.collector.likelihood
            if compiled and request.fisher_for(likelihood or Categorical()) == "empirical":
                reason += "; of a compiled graph by loss.backward(), without inputs="
        whose = "a backward pass" if some else "no backward pass"
        verb = "gave none" if some else "gave any"
        text = f"factor statistics are due at step {step} and {whose} {verb}: {reason}"
        if self._diagnostics.statistics_steps == 0:
            raise StatisticsError(text)
        self._diagnostics.missed_statistics += 1
        if reason not in self._warned:
            self._warned.add(reason)
            warn(text)

    def _numbers(self, engine: Engine, groups: Groups) -> StepNumbers:
        options = self._options
        share = warm_up_share(options.warmup, self._diagnostics.steps + 1)
        rates = self.binding.learning_rates(engine, groups, share)
        shrink: dict[str, float] = {}
        if engine.spec.weight_decay:
            shrink = {
                name: 1 - share * float(group["lr"]) * group["weight_decay"]
                for name, group in self.binding.by_name(groups).items()
            }
        decay = 0.0
        if options.average is not None:
            decay = float(torch.tensor(-1 / options.average).double().exp())
        return StepNumbers(
            step=self._diagnostics.steps + 1,
            rates=rates.stacks,
            generic_rates=rates.generic,
            momenta=self.binding.momenta(engine, groups),
            options=self._option_numbers(engine),
            generic=generic_numbers(options),
            clip=options.bound.clip if options.bound else None,
            max_block_norm=options.max_block_norm,
            shrink=shrink,
            average_decay=decay,
        )

    def _option_numbers(self, engine: Engine) -> OptionNumbers:
        return option_numbers(engine.spec, self._options, self.exact.inverse_damping)


def _as_it_is(_: str, value: Tensor) -> Tensor:
    return value
