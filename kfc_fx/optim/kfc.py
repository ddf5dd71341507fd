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
from kfc_fx.errors import OptionError, StatisticsError, StepError, warn
from kfc_fx.install import compilation_of, compile
from kfc_fx.optim.binding import Binding
from kfc_fx.optim.diagnostics import Diagnostics
from kfc_fx.optim.exact_fisher import ExactFisher
from kfc_fx.optim.gradients import all_finite, named_gradients, relative_distance
from kfc_fx.optim.options import KFCOptions, check_group
from kfc_fx.optim.rates import option_arguments
from kfc_fx.optim.run_report import Progress, append_entry
from kfc_fx.optim.schedule import averaging_rate, schedule_for
from kfc_fx.optim.update_spec import real_parameters
from kfc_fx.statistics.inputs import inputs_of
from kfc_fx.statistics.request import StatisticsRequest

DROPPED = "has a statistic that is not finite: it is dropped, the last good factor stays"
UNDECOMPOSED = "has a factor that cannot be decomposed: the identity takes its place"


class KFC(torch.optim.Optimizer):
    """Approximate natural gradient with Kronecker factors (Grosse & Martens 2016).

    Args:
        model: what :func:`kfc_fx.compile` has compiled; one that is not compiled is now, by the
            defaults.
        params: parameters or parameter groups to update; by default all of the model. A group
            may set ``lr`` and ``weight_decay``. Weight and bias of one layer share their ``lr``.
        lr: learning rate α; by default 0.01 ("adam"), 0.07 ("spectral") or 0.03 ("eigen",
            "inverse"). "adam" took at most 1.05 times the steps of its best rate at 0.01 on five
            different tasks, "spectral" as many at 0.07, but 3.5 times on one of them
            (``benchmarks/train.md``). It is that of all blocks: one whose scaling ``blocks``
            changes wants a parameter group with a rate of its own.
        scaling: how a gradient is scaled by the factors of its block. ``"adam"``: Adam in the
            eigenbasis of Ω ⊗ Γ. ``"spectral"``: steepest descent under the spectral norm in the
            metric of Ω, which needs no Fisher pass and keeps no Γ. ``"eigen"``: EKFAC, a second
            moment in the eigenbasis (George et al. 2018). ``"inverse"``: the paper's algorithm 1
            (KFC-pre).
        blocks: options of some blocks, by glob on block names:
            ``{"layer4.*": {"scaling": "spectral", "input_factor": "dense"}}``; the last match
            counts.
        momentum: decay of the first moment ("adam", 0.9; "spectral", 0.95), or μ of
            ``p ← μ p + v`` ("eigen" and "inverse", 0.7).
        nesterov: let the momentum of blocks take Nesterov's step ahead, ``β m + (1 − β) g`` in
            place of m, or ``μ p + v`` in place of p; by default with "adam" and "spectral" (as in
            Dozat 2016), not with "eigen" and "inverse" (as published).
        damping: γ. Of factored Tikhonov damping, and λ of ν ("inverse", 0.01); beside the second
            moment ("eigen", 0.01); relative to Ω's mean eigenvalue ("spectral", 0.3). "adam" has
            none but ``eps``.
        weight_decay: decoupled, ``θ ← (1 − lr·weight_decay) θ``.
        ema_decay: decay of the factors' moving average. Of the first 2/(1 − ema_decay) statistics
            the n-th weighs n times the first instead.
        factor_interval: T_s, steps between statistics. It begins as one step and grows by a quarter
            of the steps so far until it is T_s, and so does T_f.
        factor_samples: examples of each batch that statistics are estimated from, the first
            ones: a number, None for all, or "auto" for a quarter of the batch but at least 32; of
            sampled targets half, at least 128 (all with another backend than "eager"). With "auto"
            and targets that are not sampled, Ω of a layer with many locations is estimated from no
            more rows than 8 times its side, but from 8 examples and a sixteenth of the batch at
            least. The factor products cost that share, the Fisher pass all the same. A layer whose
            input does not lead with the examples takes the same share of what it leads with.
        inverse_interval: T_f, steps between refreshes of the inverses or bases. Where it equals
            ``factor_interval``, "adam" and "eigen" keep the moving average of a factor F as its
            eigenbasis Q and the diagonal of ``Qᵀ F Q``: half of the memory, and what orthogonal
            iteration leaves beside the diagonal is forgotten.
        clip: C, the bound on ν = vᵀFv + λ vᵀv of a step ("eigen", "inverse"); None for no bound.
        clip_by: ``"factors"`` computes ν from the Kronecker factors, which costs nothing;
            ``"exact"`` from Fisher-vector products through the model.
        clip_samples: examples of the batch that the exact Fisher matrix is taken of, for ν, the
            quadratic model and the adapted damping; all by default.
        quadratic_model: take step size and momentum of every step from the exact quadratic model
            of the loss instead of ``lr``, ``momentum`` and ``clip`` ("inverse"; Martens & Grosse
            2015, sections 6.4 and 7). Costs two forward-mode passes a step. ``lr`` is that of
            generic parameters then.
        adapt_damping: T₁, steps between adaptations of the damping to how well the quadratic
            model predicts the loss ("inverse"; there, section 6.5; 5 in the paper); None keeps the
            damping. Needs ``step(closure)``, and calls the closure once more at those steps, to
            see the loss that the step has led to.
        average: τ in steps of the Polyak average ``θ̄ ← ξ θ̄ + (1 − ξ) θ``, ``ξ = e^(−1/τ)``;
            None for no average. See :meth:`averaged`.
        fisher: what Γ is estimated from. ``"sampled"``: targets from the model's predictive
            distribution, by a backward pass of their own. ``"empirical"``: the gradient of the
            loss, within its backward pass, at the scale of the likelihood's. By default "empirical"
            for "adam" with classes, which takes eigenvectors of Γ alone; else "sampled".
        input_factor: ``"dense"``, ``"separable"``, or ``"auto"``: separable for convolutions
            whose dense Ω is wider than 1024.
        basis_limit: widest side of an eigenbasis ("adam", "eigen"). A dense factor of a linear or
            pointwise layer, or of output channels, that is wider is cut into equal parts, each with
            a basis of its own, as if channels of two parts were uncorrelated.
        second_moment_decay: decay of the second moment ("adam", "eigen").
        eps: ε of "adam".
        orthogonalise: how far "adam" moves the scaled gradient of a matrix, ``m̂ / (sqrt(v̂) + ε)``,
            from itself (0) to its polar factor (1), the nearest semi-orthogonal matrix, which Muon
            takes of the momentum; the Frobenius norm stays.
        generic: rule for parameters without a block, ``"adamw"`` or ``"sgd"``; by default
            "adamw" beside "adam" and "spectral", "sgd" beside the others. With "spectral" the
            tables of embeddings, norms and sides beyond the limit of a dense factor are generic.
        generic_lr_ratio: learning rate of generic parameters relative to their group's; by
            default 1, and 0.1 beside "spectral", whose rates are larger than AdamW's.
        masters: update parameters in bfloat16 or float16 through a copy in float32, which keeps
            the steps that rounding would drop.
        compile_update: run the step, but not the refreshes, through ``torch.compile`` with
            ``fullgraph=True``: its pointwise ends become one loop. The first step compiles.
        cuda_graph: replay the step, but not statistics and refreshes, as a CUDA graph, which
            spares its launches and asks the device for nothing; by default wherever all parameters
            are on one GPU and ν is not exact. It keeps a second copy of the gradients, and the
            memory of a step's intermediates between steps. A gradient
            that is not finite is found on the device then, and counted when that is next read.
        seed: of the sampled targets; by default torch's initial seed.

    Raises:
        OptionError: an option is unknown or out of range, or does not fit the backend, or a
            parameter is not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        scaling: str = "adam",
        momentum: float | None = None,
        nesterov: bool | None = None,
        damping: float | None = None,
        weight_decay: float = 0.0,
        ema_decay: float = 0.95,
        factor_interval: int = 20,
        factor_samples: int | str | None = "auto",
        inverse_interval: int = 20,
        clip: float | None = 1e-2,
        clip_by: str = "factors",
        clip_samples: int | None = None,
        quadratic_model: bool = False,
        adapt_damping: int | None = None,
        average: float | None = None,
        fisher: str | None = None,
        input_factor: str = "auto",
        basis_limit: int = 512,
        second_moment_decay: float = 0.95,
        eps: float = 1e-8,
        orthogonalise: float = 0.7,
        generic: str | None = None,
        generic_lr_ratio: float | None = None,
        masters: bool = False,
        compile_update: bool = False,
        cuda_graph: bool | None = None,
        blocks: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"KFC takes a model, got {type(model).__name__}")
        compilation = Compilation.of(compile(model) if compilation_of(model) is None else model)
        self.options = KFCOptions(
            scaling=scaling,  # type: ignore[arg-type]
            momentum=momentum,
            nesterov=nesterov,
            damping=damping,
            ema_decay=ema_decay,
            factor_interval=factor_interval,
            factor_samples=factor_samples,  # type: ignore[arg-type]
            inverse_interval=inverse_interval,
            clip=clip,
            clip_by=clip_by,  # type: ignore[arg-type]
            clip_samples=clip_samples,
            quadratic_model=quadratic_model,
            adapt_damping=adapt_damping,
            average=average,
            fisher=fisher,  # type: ignore[arg-type]
            input_factor=input_factor,  # type: ignore[arg-type]
            basis_limit=basis_limit,
            second_moment_decay=second_moment_decay,
            eps=eps,
            orthogonalise=orthogonalise,
            generic=generic,  # type: ignore[arg-type]
            generic_lr_ratio=generic_lr_ratio,
            masters=masters,
            compile_update=compile_update,
            cuda_graph=cuda_graph,
            blocks=blocks or {},
        )
        lr = self.options.default_lr if lr is None else lr
        check_group({"lr": lr, "weight_decay": weight_decay})
        partly = compilation.options.backend == "eager"
        if factor_samples not in (None, "auto") and not partly:
            raise OptionError(
                f"factor_samples needs backend='eager', got "
                f"{compilation.options.backend!r}: a compiled "
                "backward pass has the part of the batch that it takes fixed in its code"
            )
        parameters = compilation.model.parameters()
        if self.options.needs_inputs and any(p.is_complex() for p in parameters):
            raise OptionError(
                "clip_by='exact', quadratic_model and adapt_damping take the exact Fisher matrix "
                "of all parameters, and some of the model's are complex: leave them out"
            )
        self._compilation = compilation
        compilation.names.refresh_if_changed()
        self._binding = Binding(compilation, self.options)
        chosen = list(compilation.model.parameters() if params is None else params)
        if not chosen:
            raise OptionError("there is nothing to optimize: the model has no parameters")
        request = StatisticsRequest(
            forms=self.options.forms_of,
            fisher=self.options.fisher_for(compilation.options.likelihood),
            scale_free=self.options.scale_free,
            samples=self.options.factor_samples if partly else None,
            keep_inputs=self.options.needs_inputs,
            seed=seed,
        )
        self._collector = compilation.attach(request, ())
        self._made = False  # it takes no parameters of others before all of it is checked
        super().__init__(chosen, {"lr": lr, "weight_decay": weight_decay})
        self.schedule = schedule_for(self.options.scalings, factor_interval, inverse_interval)
        self._diagnostics = Diagnostics(damping=self.options.damping_of(self.options.scaling))
        self._last_step_ended: float | None = None
        self._reported = Progress(0, {})
        self._warned: set[str] = set()
        self._made = True
        compilation.assign(self._collector, self._binding.by_name(self.param_groups))
        self._exact = ExactFisher(compilation, self._collector, self.options, self._diagnostics)
        self._arm()

    # -- torch.optim.Optimizer -------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be the compiled model's, and it may set ``lr`` and
        ``weight_decay``.

        Raises:
            OptionError: it has other parameters, or sets another option; nothing is added then.
        """
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        check_group({**self.defaults, **param_group})
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
        gradients = named_gradients(self.param_groups, self._binding.names)
        if self._collector.armed:
            self._compilation.note_gradients(gradients)
        engine, diagnostics = self._bound_engine(), self._diagnostics
        if not engine.guards(gradients) and not all_finite(gradients.values()):
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
                report = engine.apply(gradients, self._arguments(engine), scales_of)
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
        engine = self._bound_engine()
        return {block.name: engine.factors(block.name) for block in engine.blocks}

    @property
    def engine(self) -> UpdateEngine:
        """What runs the generated update: its spec, its state and its programs."""
        return self._bound_engine()

    @property
    def update_source(self) -> str:
        """Source of the generated update."""
        return self.engine.program.source

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

    def initialise(self, batches: Iterable[Any]) -> None:
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
            raise StatisticsError("initialise got no batch with statistics; pass at least one")
        with torch.no_grad():
            self._use_statistics(self._bound_engine())
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
            rate = averaging_rate(diagnostics.statistics_steps, self.options.ema_decay)
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
                failed = engine.refresh(self._option_arguments(engine))
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

    def _arguments(self, engine: UpdateEngine) -> dict[str, Any]:
        options = self.options
        arguments: dict[str, Any] = {
            "lr": self._binding.learning_rates(engine, self.param_groups),
            "step": self._diagnostics.steps + 1,
            **self._option_arguments(engine),
        }
        if engine.spec.weight_decay:
            arguments["shrink"] = {
                name: 1 - float(group["lr"]) * group["weight_decay"]
                for name, group in self._binding.by_name(self.param_groups).items()
            }
        if options.average is not None:
            arguments["average_decay"] = float(torch.tensor(-1 / options.average).double().exp())
        return arguments

    def _bound_engine(self) -> UpdateEngine:
        return self._binding.engine(self.param_groups)

    def _option_arguments(self, engine: UpdateEngine) -> dict[str, Any]:
        return option_arguments(engine.spec, self.options, self._exact.inverse_damping)

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


def _copy_into(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
