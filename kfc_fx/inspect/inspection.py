"""Compile a model to look at it: capture, plan and passes, and the optimizer's update."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

from kfc_fx.capture.graph import Stage
from kfc_fx.capture.graph_passes import without_passes
from kfc_fx.codegen.program import generate
from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.compilation import Compilation
from kfc_fx.compilation.captured_graph import BoundGraph
from kfc_fx.errors import KfcError, TargetError
from kfc_fx.inspect.inputs import InputSpec
from kfc_fx.inspect.quiet import without_logs
from kfc_fx.install import compile, uncompile
from kfc_fx.optim.groups import Group
from kfc_fx.optim.kfc import KFC
from kfc_fx.optim.statistics import Statistics
from kfc_fx.optim.update_spec import real_parameters, update_spec
from kfc_fx.plan.spec import CurvaturePlan
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.request import Fisher, StatisticsRequest

CAPTURES = ("dynamo", "symbolic")
OPERATOR_ERROR = re.compile(r"""got \w+\(['"](.+)['"]\)""")
"""How dynamo quotes the error of an operator that refuses its inputs."""


@dataclass(frozen=True)
class InspectionOptions:
    """How to compile: the capture, passes to leave out, and what shapes the update."""

    capture: str = "dynamo"
    without: frozenset[str] = frozenset()
    scaling: str = "adam"
    input_factor: str = "auto"
    norm_layers: bool = True
    weight_sharing: str = "expand"

    def compile(self, model: nn.Module) -> nn.Module:
        """Compile a model anew, not captured yet."""
        return compile(
            uncompile(model),
            norm_layers=self.norm_layers,
            weight_sharing=self.weight_sharing,  # type: ignore[arg-type]
        )

    def optimizer(self, compiled: nn.Module, seed: int | None = None) -> KFC:
        """The optimizer whose update is looked at."""
        statistics = Statistics(input_factor=self.input_factor)  # type: ignore[arg-type]
        return KFC(compiled, lr=0.01, scaling=self.scaling, statistics=statistics, seed=seed)


@dataclass(frozen=True)
class Inspection:
    """A compiled model and what it was compiled from."""

    target: str
    compiled: nn.Module
    optimizer: KFC
    inputs: tuple[InputSpec, ...]
    options: InspectionOptions
    graphs: tuple[BoundGraph, ...]
    """Every captured graph under each assignment of parameters that it is run with."""
    notes: tuple[str, ...] = field(default=())

    @property
    def compilation(self) -> Compilation:
        """What the compiler knows of the model."""
        return Compilation.of(self.compiled)

    @property
    def plan(self) -> CurvaturePlan:
        """The account of every parameter."""
        return self.compilation.plan

    @property
    def request(self) -> StatisticsRequest:
        """The statistics that the optimizer asks for."""
        return self.compilation.collectors[0].request

    @property
    def fisher(self) -> Fisher:
        """What Γ is estimated from; that of classes, since there is no loss that tells more."""
        return self.request.fisher_for(self.compilation.likelihood or Categorical())

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Parameters of the model by name."""
        return real_parameters(self.compiled.named_parameters())

    @property
    def groups(self) -> dict[str, Group]:
        """The optimizer's parameter group by parameter name."""
        return dict.fromkeys(self.parameters, self.optimizer.param_groups[0])

    @cached_property
    def spec(self) -> UpdateSpec | None:
        """What the update is generated from; None where no parameter has a block."""
        if not self.plan.blocks:
            return None
        title, plan = type(self.compilation.model).__name__, self.compilation.plan
        return update_spec(title, plan, self.optimizer.options, self.parameters, self.groups)

    @cached_property
    def update_source(self) -> str:
        """Source of the update; empty where no parameter has a block."""
        return generate(self.spec).source if self.spec else ""

    @property
    def pass_names(self) -> tuple[str, ...]:
        """Names of the passes, in the order in which they run."""
        return tuple(stage.name for stage in self.graphs[0].stages[1:])


def inspect_model(
    model: nn.Module,
    target: str,
    inputs: Sequence[InputSpec],
    options: InspectionOptions | None = None,
    notes: Sequence[str] = (),
) -> Inspection:
    """Capture and compile ``model`` for example inputs; its state stays as it is.

    Args:
        target: what the model was called by.
        notes: warnings that the document is to carry.

    Raises:
        TargetError: the model does not run on such inputs.
        CaptureError, KfcError: it cannot be captured, or a pass fails.
    """
    options = options or InspectionOptions()
    compiled = options.compile(model)
    optimizer = options.optimizer(compiled)
    with without_passes(options.without):
        _capture(compiled, inputs, options.capture)
        graphs = Compilation.of(compiled).emitting_graphs()
    return Inspection(target, compiled, optimizer, tuple(inputs), options, graphs, tuple(notes))


def _capture(compiled: nn.Module, inputs: Sequence[InputSpec], capture: str) -> None:
    examples = [spec.example() for spec in inputs]
    if capture == "symbolic":
        with without_logs():
            Compilation.of(compiled).trace_symbolic(*examples)
        return
    try:
        with without_logs():
            Compilation.of(compiled).trace(*examples)
    except KfcError:
        raise
    except Exception as error:
        reason = _reason(error).rstrip(".")
        raise TargetError(
            f"{type(compiled).__name__} does not run on "
            f"{' '.join(map(str, inputs))}: {reason}. {_advice(reason, inputs)}"
        ) from error


def _advice(reason: str, inputs: Sequence[InputSpec]) -> str:
    if "more than 1 value per channel" not in reason:
        return "--input gives other shapes"
    larger = " ".join(f"--input {replace(i, shape=(2, *i.shape[1:]))}" for i in inputs)
    return f"Its norms need a larger batch ({larger}), or --eval"


def _reason(error: Exception) -> str:
    """The operator's own message, which dynamo wraps in pages of its own."""
    found = OPERATOR_ERROR.search(str(error))
    if found:
        return found.group(1)
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


def changed_nodes(before: Stage | None, after: Stage) -> tuple[list[str], list[str]]:
    """Names of the nodes that a pass created, and of those that it erased."""
    if before is None:
        return [], []
    old = [node.name for node in before.module.graph.nodes]
    new = [node.name for node in after.module.graph.nodes]
    return [n for n in new if n not in set(old)], [n for n in old if n not in set(new)]
