"""The optimizer: a ``torch.optim.Optimizer`` around the generated update."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.shards import local_of
from kfc_fx.distributed.shared_step import SharedStep
from kfc_fx.engine.factors import Factors
from kfc_fx.errors import OptionError, StepError, some_of
from kfc_fx.optim.adoption import adamw_entries
from kfc_fx.optim.averages import averages_swapped_in
from kfc_fx.optim.diagnostics import Diagnostics, joined
from kfc_fx.optim.engines import Engine
from kfc_fx.optim.generic import Generic
from kfc_fx.optim.groups import (
    check_group,
    check_loaded_groups,
    groups_of,
    warn_of_large_rates,
)
from kfc_fx.optim.hooks import loaded_with_hooks, packed_with_hooks
from kfc_fx.optim.interrupts import deferred_interrupts
from kfc_fx.optim.model_step import ModelStep
from kfc_fx.optim.model_steps import model_steps
from kfc_fx.optim.options import Distribute, KFCOptions
from kfc_fx.optim.other_options import refuse_torch_options, refuse_unknown
from kfc_fx.optim.put_back import put_back_if_raised
from kfc_fx.optim.run_report import Progress, append_entry
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.optim.scalings.table import scaling_of
from kfc_fx.optim.schedule import Schedule
from kfc_fx.optim.shown import shown
from kfc_fx.optim.states.callers import asked_by_checkpoint
from kfc_fx.optim.states.copies import Given, restored
from kfc_fx.optim.states.live import ParameterStates
from kfc_fx.optim.states.state_dict import RUN, packed, unpacked
from kfc_fx.optim.statistics import Statistics
from kfc_fx.optim.target import target_of, tensors_of
from kfc_fx.optim.together import Together

Loss = TypeVar("Loss")


class KFC(torch.optim.Optimizer):
    """Approximate natural gradient with Kronecker factors (Grosse & Martens 2016).

    Args:
        params: a model that :func:`kfc_fx.compile` has compiled, one that is not is compiled now by
            the defaults; or some of its parameters, named parameters or parameter groups beside
            ``model``. A group may set ``lr``, ``weight_decay`` and
            ``betas``. Weight and bias of one layer may have a rate each. The first of ``betas`` is
            the momentum of the group's blocks and generic parameters, where it is not the default.
        lr: learning rate α, a number or a tensor; by default that of the scaling, 0.01 ("adam"),
            0.07 ("spectral") or 0.03 ("eigen", "inverse"). A block whose scaling ``blocks`` changes
            wants a parameter group with a rate of its own.
        weight_decay: decoupled, ``θ ← (1 − lr·weight_decay) θ``.
        max_block_norm: largest Frobenius norm of the gradient ``[W b]`` of a block. A larger one is
            scaled down to it before anything else is computed from it; None for no bound.
        cautious_decay: let a number decay only where its step does not take it away from zero (Chen
            et al. 2025).
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
        warmup: steps over which all rates rise to their own, the k-th of them by k / ``warmup``, on
            top of any scheduler; None for none. Steps before a run was saved count.
        average: τ in steps of the Polyak average ``θ̄ ← ξ θ̄ + (1 − ξ) θ``, ``ξ = e^(−1/τ)``;
            None for no average. See :meth:`averaged`.
        master_weights: update parameters in bfloat16 or float16 through a copy in float32, which
            keeps the steps that rounding would drop.
        state_dtype: what moments are kept in. ``torch.bfloat16`` takes half the bytes: they are
            computed with in float32 and rounded up or down by chance, which seeds do not change.
            Bases and factors stay as they are. None: float32, or the parameter's float64.
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
        process_group: the processes that train the model together, each on batches of its own and
            with averaged gradients, as by ``DistributedDataParallel``: None for all of
            ``torch.distributed``, once it is initialised; False for this one alone.
        distribute: what they share among them. ``"refresh"``: each refreshes the bases or inverses
            of the blocks that it owns, and all get them. ``"update"``: each holds the state of the
            blocks that it owns and computes their steps, which all get. ``"none"``: each computes
            everything.
        compare_every: steps after which they compare parameters, gradients and options, beside the
            steps with statistics, where they always do.
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
        max_block_norm: float | None = None,
        cautious_decay: bool = False,
        scaling: str | Scaling = "adam",
        blocks: Mapping[str, str | Scaling | Mapping[str, Any]] | None = None,
        statistics: Statistics = Statistics(),  # noqa: B008 - frozen
        generic: str | Generic | None = None,
        warmup: int | None = None,
        average: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
        compile_update: bool = False,
        cuda_graph: bool | None = None,
        maximize: bool = False,
        seed: int | None = None,
        model: nn.Module | None = None,
        process_group: Any = None,
        distribute: Distribute = "refresh",
        compare_every: int | None = None,
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
        options = KFCOptions(
            scaling=scaling,
            blocks=blocks,
            generic=generic,
            statistics=statistics,
            warmup=warmup,
            max_block_norm=max_block_norm,
            cautious_decay=cautious_decay,
            average=average,
            master_weights=master_weights,
            state_dtype=state_dtype,
            compile_update=compile_update,
            cuda_graph=cuda_graph,
            maximize=maximize,
            seed=seed,
            distribute=distribute,
            compare_every=compare_every,
        )
        self.options: KFCOptions = options
        target = target_of(params, model)
        self._ranks = Ranks(process_group)
        self._models = model_steps(target.compilations, options, target.chosen, self._ranks)
        self._together = Together(self._ranks, self._models, options)
        self._made = False  # it takes no statistics of others before all of it is checked
        lr = options.scaling.lr if lr is None else lr
        defaults = {"lr": lr, "betas": options.betas, "weight_decay": weight_decay, RUN: ""}
        super().__init__(target.chosen, defaults)
        warn_of_large_rates(self.param_groups, options.scaling)
        self._reported = Progress(0, {})
        self._made = True
        own_groups = groups_of(weakref.ref(self))
        for own in self._models:
            own.train(own_groups)
            own.own(self.param_groups)
            own.arm()

    # -- torch.optim.Optimizer -------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be those of the optimizer's models, and it may set
        ``lr``, ``weight_decay`` and ``betas``.

        Raises:
            OptionError: it has other parameters, or sets another option; nothing is added then.
        """
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        check_group({**self.defaults, **param_group}, self.options.betas)
        for own in self._models:
            own.binding.follow()
        for parameter in tensors_of(params):
            if not any(parameter in own.binding.names for own in self._models):
                raise OptionError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one of the compiled "
                    "model; KFC updates the parameters of the models that it was made with"
                )
        super().add_param_group({**param_group, "params": params})
        if self._made:
            for own in self._models:
                own.own(self.param_groups[-1:])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, of the models that have gradients.

        Args:
            closure: clears the gradients, computes the loss, runs backward, returns the loss.

        Raises:
            StepError: no parameter has a gradient; or the damping is to be adapted and there is
                no closure.
            StatisticsError: statistics are due for the first time and none have arrived.
        """
        self._refuse_exact_fisher_on_ranks()
        trial = self._models[0].exact.trial(closure)  # of options that are for one model
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if trial is not None and loss is None:
            raise StepError("adapt_damping needs a closure that returns the loss; it returned None")
        groups = self.param_groups
        if self._changes_nothing():
            return loss
        attempt = Attempt(self._ranks)
        with self._together.telling(attempt):
            agreed, shared = self._together.begun(attempt, groups)
            stepping = self._with_gradients()
            finite = all(own.may_step(e, given, groups, shared) for own, e, given in stepping)
            if not (agreed and finite):
                for own, *_ in stepping:
                    own.skip()
                return loss
            with deferred_interrupts():
                self._take(stepping, shared)
                if trial is None:
                    for own, *_ in stepping:
                        own.end()
        if trial is not None and closure is not None:
            for own, _, gradients in stepping:
                own.exact.adapt_damping(trial, closure, loss, gradients)
                own.end()
        return loss

    def _changes_nothing(self) -> bool:
        """Whether all rates and gradients are zero and there are no statistics: torch takes such a
        step for an optimizer to make its state."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        if any(own.collector.sums.blocks for own in self._models):
            return False
        gradients = [local_of(p.grad) for p in self._parameters if p.grad is not None]
        return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)

    def _take(
        self,
        stepping: Sequence[tuple[ModelStep, Engine, dict[str, Tensor]]],
        shared: SharedStep | None,
    ) -> None:
        """The step of all models that have gradients: whole, or not at all where it raises."""
        with ExitStack() as stack:
            if len(stepping) > 1:  # the step of one writes at its end, and then no other may raise
                written = [p for _, engine, _ in stepping for p in engine.parameters.values()]
                stack.enter_context(put_back_if_raised(written))
            for own, engine, gradients in stepping:
                stack.enter_context(own.transaction(engine))
                stack.enter_context(own.step_size_noted(engine, gradients))
            for own, engine, _ in stepping:
                own.use_statistics(engine, shared)
            for own, engine, gradients in stepping:
                own.apply(engine, gradients, self.param_groups, shared)

    def _with_gradients(self) -> list[tuple[ModelStep, Engine, dict[str, Tensor]]]:
        """The models that have gradients, their engines, and these."""
        for own in self._models:
            own.check_owner(self.param_groups)
        found = [(own, own.gradients(self.param_groups)) for own in self._models]
        found = [(own, gradients) for own, gradients in found if gradients]
        if not found:
            raise StepError(
                "no parameter has a gradient: call loss.backward() before opt.step(), with a loss "
                "computed from the output of the compiled model"
            )
        return [(own, own.engine(self.param_groups), gradients) for own, gradients in found]

    def _refuse_exact_fisher_on_ranks(self) -> None:
        if self.options.needs_inputs and self._ranks.several:
            raise OptionError(
                "clip_by='exact', quadratic_model and adapt_damping take the exact Fisher matrix "
                f"of one process's batch, and this process group has {self._ranks.count} ranks: "
                "use clip_by='factors', and neither of the others"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the statistics that belong to them."""
        super().zero_grad(set_to_none)
        for own in self._models:
            own.collector.take()

    @property  # type: ignore[override]
    def state(self) -> ParameterStates:
        """The state by parameter, as soon as the plan is known: moments; factors, bases and
        counters under the weight of their block. ``clear()`` begins anew."""
        models = [(own.binding.names, own.entries(self.param_groups)) for own in self._models]
        return ParameterStates(self._parameters, models, self._restart)

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        if len(state):
            raise OptionError("the state of a KFC is loaded by opt.load_state_dict")
        if self._made:
            self._restart()

    def _restart(self) -> None:
        for own in self._models:
            own.restart()
        self._together.begin_anew()

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Parameter groups and the state by parameter, as of any ``torch.optim`` optimizer, in
        copies. What is of no parameter, counters for one, is a text in each group.

        With ``distribute="update"`` it is whole on a rank that :meth:`consolidate_state_dict` has
        brought it to. ``torch.distributed.checkpoint`` takes each rank's part.

        Raises:
            StepError: some of it is on other ranks.
        """
        asked = asked_by_checkpoint()
        for own in self._models:
            own.begin(self.param_groups)
        for own in self._models if asked is not None else ():
            own.binding.consolidated.forget()
            if asked == "whole" and own.binding.divided:
                own.binding.gather_blocks()
        elsewhere = [name for own in self._models for name in own.binding.elsewhere]
        if elsewhere and asked is None:
            raise StepError(
                f"the state of {some_of(elsewhere)} is on other ranks: call "
                "opt.consolidate_state_dict(to=0) on all ranks before opt.state_dict() on rank 0, "
                "or save by torch.distributed.checkpoint"
            )
        return self._state_dict()

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the whole state to one rank, whose next :meth:`state_dict` has it until a step is
        taken. All ranks call it together, as that of torch's ``ZeroRedundancyOptimizer``; without
        ``distribute="update"`` every rank has the whole, and nothing is done.

        Args:
            to: number of the rank in the process group.
        """
        for own in self._models:
            if own.binding.divided:
                own.binding.consolidate(to)

    def _state_dict(self) -> dict[str, Any]:
        """As much of the state as there is on this rank."""
        own_state_dict = super().state_dict

        def pack() -> dict[str, Any]:
            records = [own.record(self.param_groups) for own in self._models]
            return packed(own_state_dict(), records)

        return packed_with_hooks(self, pack)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue from a saved state, in this process or another.

        Raises:
            OptionError: the state is not that of a KFC optimizer for as many models, of the same
                parameters; it is not whole; or it is of another scaling, which shows at the first
                step where the plan is not known yet.
        """
        if asked_by_checkpoint() == "from rank 0" and any(o.binding.divided for o in self._models):
            raise OptionError(
                "broadcast_from_rank0 brings no blocks to the ranks that own them: load the whole "
                "state on every rank, without it, or use torch.distributed.checkpoint.load"
            )
        loaded_with_hooks(self, state_dict, self._load)
        self._together.begin_anew()

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        places = [own.place(self.param_groups) for own in self._models]
        states = unpacked(state_dict, self._parameters, places)
        groups = [{**group, RUN: ""} for group in state_dict["param_groups"]]
        check_loaded_groups(groups, self.options.betas)
        for own, (state, _) in zip(self._models, states, strict=True):
            own.binding.check_fits(state)
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        for own, (state, record) in zip(self._models, states, strict=True):
            own.load(state, record)
        self._reported = Progress(self.diagnostics.steps, dict(self.diagnostics.seconds))

    def adopt(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of a run by ``torch.optim.AdamW`` or ``Adam``: the moments of the
        generic parameters, and the count of steps. Blocks begin anew, with statistics at the next
        step.

        Args:
            state_dict: of an optimizer whose groups list the same parameters in the same order.

        Raises:
            OptionError: it is not of AdamW, or of other parameters.
        """
        entries = adamw_entries(state_dict, [p for g in self.param_groups for p in g["params"]])
        for own in self._models:
            own.adopt(entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> KFC:
        """Together with its models: ``copy.deepcopy((net, opt))`` trains on as the originals do."""
        memo[id(self._ranks.given)] = self._ranks.given  # a process group is no value
        copied = restored(type(self), copy.deepcopy(self._given(), memo), self._state_dict())
        memo[id(self)] = copied
        for own, its in zip(self._models, copied._models, strict=True):
            its.binding.take_owners(own.binding.owners)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (type(self), self._given(), self._state_dict())

    def _given(self) -> Given:
        models = [own.compilation.model for own in self._models]
        return Given.of(models, self.param_groups, self.options, self.defaults, self._ranks.given)

    # -- what users look at ----------------------------------------------------------------

    def __repr__(self) -> str:
        engines = [own.binding.current for own in self._models]
        likelihoods = [own.collector.likelihood_line for own in self._models]
        return shown(self.options, self.param_groups, engines, likelihoods)

    @property
    def diagnostics(self) -> Diagnostics:
        """Counters, timings and last values; reading it may wait for the device. Of several models
        what they have in common, and their sums and largest values."""
        first, *others = (own.diagnostics for own in self._models)
        return joined([first, *others]) if others else first

    @property
    def factors(self) -> Mapping[str, Factors]:
        """Factors by block name: ``opt.factors["conv1"].omega`` and ``.gamma``. Of several models
        the names begin with the number of the model: ``"0.conv1"``. With ``distribute="update"``
        they are those of the blocks that this rank owns."""
        found: dict[str, Factors] = {}
        for index, own in enumerate(self._models):
            engine = own.engine(self.param_groups)
            prefix = f"{index}." if len(self._models) > 1 else ""
            names = [block.name for stack in engine.held_stacks for block in stack.blocks]
            found |= {prefix + name: engine.factors(name) for name in names}
        return found

    @property
    def update_source(self) -> str:
        """Source of the generated update, of one model after the other."""
        return "\n\n".join(o.engine(self.param_groups).source for o in self._models)

    def save_report(self, path: str | Path, *, loss: float | Tensor | None = None) -> None:
        """Add to a report of the run: step, loss, rates, time by part; spectra of all factors.

        Call it every so often; ``kfc-fx inspect MODEL --view run --report PATH`` shows the report.

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
        with averages_swapped_in([own.binding for own in self._models]):
            yield

    def initialize(self, batches: Iterable[Any]) -> None:
        """Take the first factors from some batches, without a step.

        Args:
            batches: an iterable of inputs: a tensor, a tuple or list whose first entry is the
                input (a data loader's ``(x, y)``), or a dict of keyword arguments.

        Raises:
            StatisticsError: there was no batch.
            OptionError: the optimizer has several models, and it is not said whose the batches are.
        """
        if len(self._models) > 1:
            raise OptionError("initialize is for an optimizer of one model; make one for each")
        self._together.initialize(self._models[0], batches, self.param_groups)

    @property
    def _engine(self) -> Engine:
        """What runs the generated update of the first model."""
        return self._models[0].engine(self.param_groups)

    @property
    def schedule(self) -> Schedule:
        """When statistics and refreshes are due."""
        return self._models[0].schedule
