"""The optimizer: a ``torch.optim.Optimizer`` around the generated update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfc_fx.compilation import Compilation
from kfc_fx.engine.engine import UpdateEngine
from kfc_fx.engine.factors import Factors
from kfc_fx.engine.screening import screen
from kfc_fx.engine.state import SavedState
from kfc_fx.engine.step_inputs import OptionNumbers, StepNumbers
from kfc_fx.errors import OptionError, StatisticsError, StepError, warn
from kfc_fx.optim.binding import Binding
from kfc_fx.optim.diagnostics import Diagnostics
from kfc_fx.optim.exact_fisher import ExactFisher
from kfc_fx.optim.generic import Generic
from kfc_fx.optim.gradients import all_finite, named_gradients, relative_distance
from kfc_fx.optim.groups import check_group
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.other_options import refuse_torch_options, refuse_unknown
from kfc_fx.optim.rates import generic_numbers, option_numbers
from kfc_fx.optim.run_report import Progress, append_entry
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.optim.scalings.table import scaling_of
from kfc_fx.optim.schedule import Schedule, averaging_rate
from kfc_fx.optim.shown import shown
from kfc_fx.optim.statistics import Statistics
from kfc_fx.optim.target import target_of
from kfc_fx.optim.update_spec import real_parameters
from kfc_fx.statistics.inputs import inputs_of
from kfc_fx.statistics.request import StatisticsRequest

DROPPED = "has a statistic that is not finite: it is dropped, the last good factor stays"
UNDECOMPOSED = "has a factor that cannot be decomposed: the identity takes its place"


class KFC(torch.optim.Optimizer):
    """Approximate natural gradient with Kronecker factors (Grosse & Martens 2016).

    Args:
        params: a model that :func:`kfc_fx.compile` has compiled, one that is not is compiled now by
            the defaults; or some of its parameters, named parameters or parameter groups beside
            ``model``. A group may set ``lr``, ``weight_decay`` and
            ``betas``; weight and bias of one layer share their ``lr``. The first of ``betas`` is
            the momentum of the group's blocks and generic parameters, where it is not the default.
        lr: learning rate α, a number or a tensor; by default that of the scaling, 0.01 ("adam"),
            0.07 ("spectral") or 0.03 ("eigen", "inverse"). A block whose scaling ``blocks`` changes
            wants a parameter group with a rate of its own.
        weight_decay: decoupled, ``θ ← (1 − lr·weight_decay) θ``.
        scaling: how a gradient is scaled by the factors of its block: :class:`kfc_fx.Adam`,
            :class:`kfc_fx.Spectral`, :class:`kfc_fx.Eigen` or :class:`kfc_fx.Inverse`, which have
            the options of each, or a name that stands for its defaults.
        blocks: options of some blocks, by glob on block names: a scaling, or a dict of ``scaling``
            and ``input_factor``, as in ``{"layer4.*": kfc_fx.Spectral(damping=0.1)}``; the last
            match counts.
        statistics: what factors are estimated from, and how often: :class:`kfc_fx.Statistics`.
        generic: rule for parameters without a block: :class:`kfc_fx.GenericAdamW`,
            :class:`kfc_fx.GenericSGD` or a name; by default that of the scaling, "adamw" beside
            "adam" and "spectral", "sgd" beside the others.
        average: τ in steps of the Polyak average ``θ̄ ← ξ θ̄ + (1 − ξ) θ``, ``ξ = e^(−1/τ)``;
            None for no average. See :meth:`averaged`.
        master_weights: update parameters in bfloat16 or float16 through a copy in float32, which
            keeps the steps that rounding would drop.
        compile_update: run the step, but not the refreshes, through ``torch.compile`` with
            ``fullgraph=True``: its pointwise ends become one loop. The first step compiles.
        cuda_graph: replay the step, but not statistics and refreshes, as a CUDA graph, which spares
            its launches and asks the device for nothing. None does so wherever all parameters are
            on one GPU and ν is not exact. The graph keeps a second copy of the gradients, and the
            memory of a step's intermediates. A gradient that is not finite is found on the device
            then, and counted when ``diagnostics`` is next read.
        maximize: ascend what was differentiated.
        seed: of the sampled targets; by default torch's initial seed.
        model: the compiled model, where ``params`` are some of its parameters.
        foreach, fused, capturable, differentiable: None or False; torch's own optimizers have them.

    Raises:
        OptionError: an option is unknown, of the wrong type or out of range, or does not fit the
            backend, or a parameter is not the model's.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        weight_decay: float = 0.0,
        scaling: str | Scaling = "adam",
        blocks: Mapping[str, str | Scaling | Mapping[str, Any]] | None = None,
        statistics: Statistics = Statistics(),  # noqa: B008 - frozen
        generic: str | Generic | None = None,
        average: float | None = None,
        master_weights: bool = False,
        compile_update: bool = False,
        cuda_graph: bool | None = None,
        maximize: bool = False,
        seed: int | None = None,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool | None = None,
        differentiable: bool | None = None,
        **unknown: Any,
    ) -> None:
        refuse_torch_options(
            foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable
        )
        refuse_unknown(unknown, scaling_of("scaling", scaling))
        self.options = options = KFCOptions(
            *(scaling, blocks, generic, statistics, average),
            *(master_weights, compile_update, cuda_graph, maximize, seed),
        )
        compilation, chosen = target_of(params, model)
        _check_model(compilation, options)
        self._compilation = compilation
        compilation.names.refresh_if_changed()
        self._binding = Binding(compilation, options)
        self._collector = compilation.attach(_request(compilation, options), ())
        self._made = False  # it takes no parameters of others before all of it is checked
        lr = options.scaling.lr if lr is None else lr
        super().__init__(chosen, {"lr": lr, "betas": options.betas, "weight_decay": weight_decay})
        every, refresh_every = statistics.every, statistics.refresh_every
        self.schedule = Schedule(every, refresh_every, options.first_steps)
        self._diagnostics = Diagnostics(damping=getattr(options.scaling, "damping", None))
        self._last_step_ended: float | None = None
        self._reported = Progress(0, {})
        self._warned: set[str] = set()
        self._made = True
        compilation.assign(self._collector, self._binding.by_name(self.param_groups))
        self._exact = ExactFisher(compilation, self._collector, options, self._diagnostics)
        self._arm()

    # -- torch.optim.Optimizer -------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be the compiled model's, and it may set ``lr``,
        ``weight_decay`` and ``betas``.

        Raises:
            OptionError: it has other parameters, or sets another option; nothing is added then.
        """
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        check_group({**self.defaults, **param_group}, self.options.betas)
        for entry in params:
            parameter = entry[1] if isinstance(entry, tuple) else entry  # named, as torch allows
            if isinstance(parameter, Tensor) and parameter not in self._binding.names:
                raise OptionError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one of the compiled "
                    "model; KFC updates the parameters of the model it was made with"
                )
        super().add_param_group({**param_group, "params": params})
        if self._made:
            self._compilation.assign(self._collector, self._binding.by_name(self.param_groups[-1:]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: clears the gradients, computes the loss, runs backward, returns the loss.

        Raises:
            StepError: no parameter has a gradient; or the damping is to be adapted and there is
                no closure.
            StatisticsError: statistics are due for the first time and none have arrived.
        """
        refuse_several_processes()
        trial = self._exact.trial(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if trial is not None and loss is None:
            raise StepError("adapt_damping needs a closure that returns the loss; it returned None")
        self._check_owner()
        maximize = self.options.maximize
        gradients = named_gradients(self.param_groups, self._binding.names, maximize=maximize)
        if self._collector.armed:
            self._compilation.note_gradients(gradients)
        engine, diagnostics = self._engine, self._diagnostics
        momenta = self._binding.momenta(engine, self.param_groups)
        if not engine.guards(gradients, momenta) and not all_finite(gradients.values()):
            self._note_skipped(1)
            self._collector.take()
            return loss
        before: list[Tensor] | None = None
        if self.schedule.refresh_due(diagnostics.steps):  # a refresh waits for the device anyway
            self._settle(engine)
            before = [engine.parameters[name].detach().clone() for name in gradients]
        self._note_gradient_time()
        with engine.transaction(), diagnostics.transaction():
            self._use_statistics(engine)
            with diagnostics.timed("update"):
                scales_of = partial(self._exact.scales, gradients)
                report = engine.apply(gradients, self._numbers(engine), scales_of)
        if before is not None:
            moved = [engine.parameters[name].detach() for name in gradients]
            diagnostics.note_step(relative_distance(before, moved))
        diagnostics.last_nu = report.get("nu")
        diagnostics.last_clip_scale = report.get("clip_scale")
        diagnostics.steps += 1
        if trial is not None and closure is not None:
            self._exact.adapt_damping(trial, closure, loss, gradients)
        self._collector.take()
        self._arm()
        self._last_step_ended = time.perf_counter()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the statistics that belong to them."""
        super().zero_grad(set_to_none)
        self._collector.take()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Parameter groups, and under ``"kfc"`` the state by block and parameter name."""
        return {
            **super().state_dict(),
            "kfc": {
                **vars(self._binding.saved()),
                "counters": self.diagnostics.counters(),
                "generators": self._collector.generator_states(),
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue from a saved state, in this process or another.

        Raises:
            OptionError: the state is not that of a KFC optimizer.
        """
        if "kfc" not in state_dict:
            raise OptionError("this state_dict is not of a KFC optimizer: it has no entry 'kfc'")
        kfc = state_dict["kfc"]
        try:
            saved = SavedState.from_dict(kfc)
        except KeyError as error:
            raise OptionError(f"this state_dict is not whole: {error} is missing") from None
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        self._binding.load(saved)
        self.diagnostics.restore(kfc["counters"])
        self._collector.set_generator_states(kfc["generators"])
        self._collector.take()
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse pickle and deepcopy, which would part the optimizer from its model."""
        raise OptionError(
            "KFC belongs to its compiled model and is not copied or pickled: copy the model, make "
            "a KFC for the copy, and load this one's state_dict"
        )

    # -- what users look at ----------------------------------------------------------------

    def __repr__(self) -> str:
        return shown(self.options, self.param_groups, self._binding.current)

    @property
    def diagnostics(self) -> Diagnostics:
        """Counters, timings and last values; reading it may wait for the device."""
        engine = self._binding.current
        if engine is not None and self._settle(engine):
            self._arm()
        return self._diagnostics

    @property
    def factors(self) -> Mapping[str, Factors]:
        """Factors by block name: ``opt.factors["conv1"].omega`` and ``.gamma``."""
        engine = self._engine
        return {block.name: engine.factors(block.name) for block in engine.blocks}

    @property
    def update_source(self) -> str:
        """Source of the generated update."""
        return self._engine.program.source

    def save_report(self, path: str | Path, *, loss: float | Tensor | None = None) -> None:
        """Add to a report of the run: step, loss, rates, time by part; spectra of all factors.

        Call it every so often; ``kfc-fx inspect MODEL --report PATH`` shows the report.

        Args:
            path: of a JSON file, made by the first call and added to by later ones.
            loss: the training loss, if it is to be in the report; one that is not finite is
                ``null`` there, as such numbers are in JSON.

        Raises:
            KfcError: the file there is no report.
        """
        lr = float(self.param_groups[0]["lr"])
        self._reported = append_entry(
            Path(path), self.diagnostics, self._reported, self.factors, lr=lr, loss=loss
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the Polyak-averaged parameters in while the context lasts.

        Raises:
            StepError: averaging is off, or no step was taken.
        """
        averages = self._binding.average
        if not averages:
            raise StepError("no averaged parameters: make KFC with average=τ and take a step first")
        own = real_parameters(self._compilation)
        kept = {name: own[name].detach().clone() for name in averages}
        try:
            _copy_into(own, averages)
            yield
        finally:
            _copy_into(own, kept)

    def initialize(self, batches: Iterable[Any]) -> None:
        """Take the first factors from some batches, without a step.

        Args:
            batches: an iterable of inputs: a tensor, a tuple or list whose first entry is the
                input (a data loader's ``(x, y)``), or a dict of keyword arguments.

        Raises:
            StatisticsError: there was no batch.
        """
        self._collector.take()
        for batch in batches:
            args, kwargs = inputs_of(batch)
            self._compilation.collect_statistics(self._collector, *args, **kwargs)
        if not self._collector.sums.blocks:
            raise StatisticsError("initialize got no batch with statistics; pass at least one")
        with torch.no_grad():
            self._use_statistics(self._engine)
        self._collector.take()

    # -- one step ------------------------------------------------------------------------

    def _check_owner(self) -> None:
        if not self._compilation.known_to_model:
            raise StepError(
                "the model was compiled anew, or uncompiled, after this KFC was made: make a KFC "
                "for the model as it is now"
            )
        owner_of = self._compilation.owner_of
        for name in self._binding.by_name(self.param_groups):
            if owner_of(name) is not self._collector:
                raise StepError(f"another KFC was made for {name}; step that one")

    def _settle(self, engine: UpdateEngine) -> int:
        """Count the steps that the device did not take as skipped; returns how many."""
        skipped = engine.take_skipped()
        self._diagnostics.steps -= skipped
        if skipped:
            self._note_skipped(skipped)
        return skipped

    def _note_skipped(self, count: int) -> None:
        before = self._diagnostics.skipped_steps
        self._diagnostics.skipped_steps += count
        if not before:
            warn(
                "a gradient is not finite: the step is skipped, parameters and state stay "
                "(opt.diagnostics.skipped_steps counts these)"
            )

    def _use_statistics(self, engine: UpdateEngine) -> None:
        """Statistics into factors, and factors into inverses or bases, where they are due."""
        step, diagnostics = self._diagnostics.steps, self._diagnostics
        statistics = self._collector.sums
        if statistics.blocks:
            rate = averaging_rate(diagnostics.statistics_steps, self.options.statistics.decay)
            screened = screen(statistics, engine.spec.stacks, rate)
            diagnostics.count("dropped_statistics", screened.dropped, DROPPED)
            with diagnostics.timed("statistics"):
                engine.accumulate(screened)
            diagnostics.statistics_steps += 1
        if self._collector.armed and (not statistics.blocks or self._collector.missing):
            self._note_missed(step)
        at_once = engine.spec.factors_in_basis and bool(statistics.blocks)
        due = not engine.started or at_once or self.schedule.refresh_due(step)
        if due and not engine.waiting:  # there is nothing to make a basis of for some blocks
            with diagnostics.timed("refresh"):
                failed = engine.refresh(self._option_numbers(engine))
            diagnostics.count("inverse_failures", failed, UNDECOMPOSED)
            diagnostics.refreshes += 1

    def _note_gradient_time(self) -> None:
        """Share the time since the last step between the gradient and the statistics in it."""
        seconds, statistics = self._diagnostics.seconds, self._collector.take_seconds()
        seconds["statistics"] += statistics  # type: ignore[assignment]
        if self._last_step_ended is not None:
            between = time.perf_counter() - self._last_step_ended
            seconds["gradient"] += between - statistics  # type: ignore[assignment]

    def _note_missed(self, step: int) -> None:
        """Count a due step that has no statistics, and warn of each reason once.

        Raises:
            StatisticsError: no step has had any yet, so that there are no factors to go on with.
        """
        reason, some = self._collector.take_missing(), bool(self._collector.sums.blocks)
        if not reason:
            reason = self._compilation.why_not_called
            if (
                self._compilation.options.backend != "eager"
                and self._collector.request.fisher == "empirical"
            ):
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

    def _numbers(self, engine: UpdateEngine) -> StepNumbers:
        options, groups = self.options, self.param_groups
        rates = self._binding.learning_rates(engine, groups)
        shrink: dict[str, float] = {}
        if engine.spec.weight_decay:
            shrink = {
                name: 1 - float(group["lr"]) * group["weight_decay"]
                for name, group in self._binding.by_name(groups).items()
            }
        decay = 0.0
        if options.average is not None:
            decay = float(torch.tensor(-1 / options.average).double().exp())
        return StepNumbers(
            step=self._diagnostics.steps + 1,
            rates=rates.stacks,
            generic_rates=rates.generic,
            momenta=self._binding.momenta(engine, groups),
            options=self._option_numbers(engine),
            generic=generic_numbers(options),
            clip=options.bound.clip if options.bound else None,
            shrink=shrink,
            average_decay=decay,
        )

    @property
    def _engine(self) -> UpdateEngine:
        """What runs the generated update: its spec, its state and its programs."""
        return self._binding.engine(self.param_groups)

    def _option_numbers(self, engine: UpdateEngine) -> OptionNumbers:
        return option_numbers(engine.spec, self.options, self._exact.inverse_damping)

    def _arm(self) -> None:
        """Let the next forward pass emit, if statistics are due at the next step, or there are
        blocks without any, which have joined since the last."""
        engine = self._binding.current
        waiting = engine is not None and engine.waiting
        due = self.schedule.statistics_due(self._diagnostics.steps)
        self._collector.arm(due or waiting)


def refuse_several_processes() -> None:
    """Raise :class:`OptionError` in a process group of more than one rank: each rank has the
    statistics of its own batch, so that replicas would drift apart."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise OptionError(
                f"KFC does not train on several processes yet, and this process group has {ranks} "
                "ranks: each would take its own factors, and the replicas would drift apart. Train "
                "in one process, or by an optimizer of torch.optim"
            )


def _check_model(compilation: Compilation, options: KFCOptions) -> None:
    """Raise :class:`OptionError` for options that do not go with the model or its backend."""
    samples, backend = options.statistics.samples, compilation.options.backend
    if samples not in (None, "auto") and backend != "eager":
        raise OptionError(
            f"Statistics: samples needs backend='eager', got {backend!r}: a compiled backward pass "
            "has the part of the batch that it takes fixed in its code"
        )
    if options.needs_inputs and any(p.is_complex() for p in compilation.model.parameters()):
        raise OptionError(
            "clip_by='exact', quadratic_model and adapt_damping take the exact Fisher matrix of "
            "all parameters, and some of the model's are complex: leave them out"
        )


def _request(compilation: Compilation, options: KFCOptions) -> StatisticsRequest:
    """The statistics that the options ask for."""
    return StatisticsRequest(
        forms=options.by_block.forms_of,
        fisher=options.fisher_for(compilation.options.likelihood),
        scale_free=options.scale_free,
        samples=options.statistics.samples if compilation.options.backend == "eager" else None,
        keep_inputs=options.needs_inputs,
        seed=options.seed,
        maximize=options.maximize,
    )


def _copy_into(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
