"""The step of one optimizer on several ranks: what they compare, and what they make one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kfc_fx.capture.wrappers import refuse_tensor_parallel
from kfc_fx.distributed.agreement import (
    Compared,
    Standing,
    agreed,
    digest,
    digest_of_tensors,
)
from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.plans import PlanText, merged_plan
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.shards import is_sharded
from kfc_fx.distributed.shared_step import SharedStep
from kfc_fx.errors import warn
from kfc_fx.optim.groups import Group
from kfc_fx.optim.model_step import ModelStep
from kfc_fx.optim.options import KFCOptions, by_name
from kfc_fx.plan.coverage import NOT_USED
from kfc_fx.plan.spec import CurvaturePlan

COMPARED = ("options", "counts", "parameters", "gradients")
EXCHANGED = ("plan", "likelihood")
UNDECIDED, NEW_PLAN = "without likelihood", "with a new plan"
FLAGS = (UNDECIDED, NEW_PLAN)
NAMES = (COMPARED, EXCHANGED, FLAGS)

NOTHING = CurvaturePlan((), (), ())
"""Of a model that was not called yet."""
APART = ("seed",)
"""Options that ranks may have of their own."""

Groups = Sequence[Group]


class Together:
    """The models of one optimizer on several ranks.

    Before a step with statistics the ranks compare, by one collective, all on which their steps
    depend: so that replicas that have drifted apart are an error at once, and not a worse model.

    Args:
        options: of the optimizer.
    """

    def __init__(self, ranks: Ranks, models: Sequence[ModelStep], options: KFCOptions) -> None:
        self._ranks, self._models, self._given = ranks, models, options
        self._merged: dict[int, tuple[CurvaturePlan, CurvaturePlan]] = {}
        """By number of the model: its plan here, and that of all ranks, where they differ."""
        self._digest: int | None = None
        """Of the plans that the ranks have taken last; None before the first comparison."""
        self._signature: object = None

    @contextmanager
    def telling(self, attempt: Attempt) -> Iterator[None]:
        """Leave word of what the body raises, if the other ranks do not know of it."""
        try:
            yield
        except Exception as error:
            if self._ranks.several and not attempt.told:
                self._ranks.tell(self._steps, error)
            raise

    def begun(self, attempt: Attempt, groups: Groups) -> tuple[bool, SharedStep | None]:
        """Begin a step: whether it can be taken, and what the ranks share of it.

        Whether they compare, and share something, follows from what all ranks have alike: counters,
        and the parameters of model and groups.

        Raises:
            StepError: see :meth:`agree`.
        """
        if not (self._ranks.several or any(own.binding.divided for own in self._models)):
            return True, None
        has_statistics = any(own.collector.armed for own in self._models)
        every = self._given.compare_every
        shared = SharedStep(self._ranks, attempt, has_statistics)
        for own in self._models:
            own.binding.follow()
        changed = self._signature != [own.binding.signature(groups) for own in self._models]
        due = has_statistics or self._digest is None or changed
        if due or (every is not None and self._steps % every == 0):
            return self.agree(attempt, groups), shared
        return True, shared

    def initialize(self, own: ModelStep, batches: Iterable[Any], groups: Groups) -> None:
        """Make the first factors of a model of some batches, of all ranks together.

        Raises:
            StatisticsError: there was no batch; on another rank it is a :class:`StepError`.
        """
        if not self._ranks.several:
            own.collect(batches)
            own.initialize(groups, None)
            return
        attempt = Attempt(self._ranks)
        with attempt.local():
            own.collect(batches)
        with self.telling(attempt):
            self.agree(attempt, groups)
            own.initialize(groups, SharedStep(self._ranks, attempt, has_statistics=True))

    def begin_anew(self) -> None:
        """Compare before the next step: another state was loaded. What has failed is over."""
        self._digest, self._signature = None, None
        self._ranks.begin_anew()

    @property
    def _steps(self) -> int:
        return max(own.counts()["steps"] for own in self._models)

    def agree(self, attempt: Attempt, groups: Groups) -> bool:
        """Compare, and take the same plan and likelihood; returns whether a step can be taken.

        Raises:
            StepError: something has failed on another rank; or what must be the same differs.
        """
        standing, texts = Standing(), None
        with attempt.local():
            for own in self._models:
                own.check_owner(groups)
                refuse_tensor_parallel(own.compilation.model)
            texts = [PlanText.of(self._plan(own)) for own in self._models]
            standing = self._standing(groups, texts)
        agreement = agreed(self._ranks, attempt, standing, NAMES)
        assert texts is not None
        if agreement.differing or NEW_PLAN in agreement.flagged:
            if "likelihood" in agreement.differing:
                states = [own.collector.choice.state() for own in self._models]
                everybodys = self._ranks.gather_objects(states)
                with attempt.local():
                    self._take_likelihoods(everybodys)
            differs = "plan" in agreement.differing
            everywhere = self._ranks.gather_objects(texts) if differs else []
            with attempt.local():
                self._take_plans(everywhere, groups)
            attempt.vote()
            plans = [PlanText.of(self._plan(own)).digest for own in self._models]
            self._digest = digest(json.dumps(plans))
        self._signature = [own.binding.signature(groups) for own in self._models]
        self._ranks.note_agreement()
        unknown = any(own.collector.likelihood is None for own in self._models)
        return not (unknown and UNDECIDED in agreement.flagged)

    def _plan(self, own: ModelStep) -> CurvaturePlan:
        """What this rank knows of the plan: its own, with what it has learned of the others'."""
        plan = own.compilation.plan if own.compilation.captured else NOTHING
        here, everywhere = self._merged.get(own.number, (NOTHING, plan))
        return everywhere if _same(here, plan) else plan

    # -- what is compared --------------------------------------------------------------------

    def _standing(self, groups: Groups, texts: Sequence[PlanText]) -> Standing:
        parameters = {
            f"{own.number}.{name}": own.binding.parameters[name]
            for own in self._models
            for name in own.binding.by_name(groups)
        }
        gradients = {
            f"{own.number}.{name}": gradient
            for own in self._models
            for name, gradient in own.gradients(groups).items()
        }
        values, slopes = _not_sharded(parameters), _not_sharded(gradients)
        parts = sorted(gradients.keys() - slopes.keys())  # sharded: they are there on all, or none
        slope_digest = digest(f"{digest_of_tensors(slopes)} {parts}")
        counts = self._counts()
        options = self._all_options(groups, parameters)
        apart = "or pass process_group=False to train each rank alone"
        compared = (
            Compared(
                "options",
                digest(json.dumps(options)),
                lambda: options,
                "Make the same KFC for the same model on all ranks",
            ),
            Compared(
                "counts",
                digest(json.dumps(counts)),
                lambda: counts,
                "A step was taken on some ranks alone: load a checkpoint on all",
            ),
            Compared(
                "parameters",
                digest_of_tensors(values),
                lambda: _each(values),
                "Begin with the same values, as by wrapping the model in "
                f"DistributedDataParallel; {apart}",
            ),
            Compared(
                "gradients",
                slope_digest,
                lambda: _each(slopes) | dict.fromkeys(parts, "there"),
                f"Wrap the model in DistributedDataParallel, which averages them; {apart}",
            ),
        )
        likelihoods = [own.collector.choice.state() for own in self._models]
        plan = digest(json.dumps([text.digest for text in texts]))
        return Standing(
            compared,
            {"plan": plan, "likelihood": digest(json.dumps(likelihoods))},
            {
                UNDECIDED: any(own.is_without_likelihood for own in self._models),
                NEW_PLAN: plan != self._digest,
            },
        )

    def _counts(self) -> dict[str, object]:
        return {
            f"number of {name} of model {own.number}": count
            for own in self._models
            for name, count in own.counts().items()
        }

    def _all_options(self, groups: Groups, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        """All that a step depends on besides tensors, as texts by name."""
        found = {n: _shown(v) for n, v in by_name(self._given).items() if n not in APART}
        found["torch"] = torch.__version__
        for number, group in enumerate(groups):
            for name in ("lr", "weight_decay", "betas"):
                value = group[name]
                shown = float(value) if isinstance(value, Tensor) else value
                found[f"{name} of group {number}"] = repr(shown)
        for own in self._models:
            given = own.compilation.options.as_given()
            whose = f"of kfc_fx.compile, model {own.number}"
            found |= {f"{name}= {whose}": _shown(value) for name, value in given.items()}
        for name, p in parameters.items():
            found[f"parameter {name}"] = f"{tuple(p.shape)} {p.dtype}, trained: {p.requires_grad}"
        return found

    # -- what is made one --------------------------------------------------------------------

    def _take_likelihoods(self, everywhere: Sequence[Sequence[Mapping[str, object]]]) -> None:
        """Take what the first rank that knows has found; a rank that has found another gives no
        statistics at this step.

        Args:
            everywhere: of each rank what it has found, by model.
        """
        for number, own in enumerate(self._models):
            found: dict[str, object] = {}
            for states in everywhere:
                for path, state in states[number].items():
                    found.setdefault(path, state)
            before = own.collector.choice.state()
            if any(found[path] != state for path, state in before.items()):
                here = "; ".join(own.collector.choice.lines)
                own.collector.take()
                own.collector.choice.restore(found)
                warn(
                    "this rank has found another likelihood than a rank before it, whose it takes: "
                    f"{here} here. Pass likelihood= to kfc_fx.compile"
                )
            own.collector.choice.restore(found)

    def _take_plans(self, everywhere: Sequence[Sequence[PlanText]], groups: Groups) -> None:
        """Take one plan for each model, and build its engine.

        Args:
            everywhere: of each rank what it knows of the plans, by model; empty where all know the
                same.
        """
        for place, own in enumerate(self._models):
            plan, gradients = self._plan(own), own.gradients(groups)
            if everywhere:
                here = own.compilation.plan if own.compilation.captured else plan
                order = list(own.binding.parameters)
                plan = merged_plan(plan, [each[place] for each in everywhere], order)
                self._merged[own.number] = (here, plan)
            if plan is NOTHING:
                continue
            own.binding.agree(plan)
            if gradients:
                own.engine(groups)
            unused = {generic.name for generic in plan.generic if generic.reason == NOT_USED}
            own.compilation.note_gradients(unused & gradients.keys())


def _not_sharded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that all ranks have alike."""
    return {name: tensor for name, tensor in tensors.items() if not is_sharded([tensor])}


def _each(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{digest_of_tensors({name: t}):x}" for name, t in tensors.items()}


def _same(one: CurvaturePlan, other: CurvaturePlan) -> bool:
    return (one.blocks, one.generic) == (other.blocks, other.generic)


def _shown(value: object) -> str:
    """As text, without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
