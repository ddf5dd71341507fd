"""The account of every parameter of a model, over all that was captured of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from kfc_fx.capture.graph_breaks import BreakLog, frame_of
from kfc_fx.capture.layer_captures import LayerCaptures
from kfc_fx.capture.parameter_names import ParameterNames
from kfc_fx.compilation.bindings import Call
from kfc_fx.compilation.captured_graph import CapturedGraph
from kfc_fx.compilation.options import CompileOptions
from kfc_fx.compilation.uses_outside import use_outside, uses_outside
from kfc_fx.plan.coverage import NOT_USED, build_plan, refuse_generic_layers
from kfc_fx.plan.spec import (
    BreakSpec,
    CurvaturePlan,
    GenericSpec,
    GraphSpec,
    GraphUses,
    ParameterSpec,
    UnmatchedUse,
)
from kfc_fx.statistics.outputs import float_tensors


class Account:
    """Captured graphs, what plain Python did between them, and the plan that follows.

    Args:
        breaks: where Python runs between the graphs; ``layers``: those captured for themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        options: CompileOptions,
        names: ParameterNames,
        breaks: BreakLog,
        layers: LayerCaptures,
    ) -> None:
        self.graphs: list[CapturedGraph] = []
        self._model, self._options, self._names = model, options, names
        self._breaks, self._layers = breaks, layers
        self._outside: dict[tuple[str, str], UnmatchedUse] = {}
        self._with_gradient: dict[str, str] = {}
        self._plan: tuple[object, CurvaturePlan] | None = None

    @property
    def revision(self) -> int:
        """Grows with every graph, binding and use that is found; the plan may change then."""
        return len(self._outside) + sum(1 + len(graph.bindings) for graph in self.graphs)

    @property
    def plan(self) -> CurvaturePlan:
        """The plan over all graphs captured so far; there must be one."""
        parameters = self._parameter_specs()
        if self._plan is None or self._plan[0] != parameters:
            self._plan = (parameters, self._built(parameters))
        return self._plan[1]

    def note_change(self) -> None:
        """The graphs or their bindings have changed."""
        self._plan = None

    def note_call(self, output: object, call: Call) -> None:
        """Look for what plain Python did in a call, where there was any between the graphs.

        Args:
            output: of the model.
        """
        if self._breaks.breaks or self._layers.alone or not self.graphs:
            forwards = (frame_of(module) for module in self._model.modules())
            self._breaks.recall(filter(None, forwards))
            self._note_uses_outside(output, call)
        if self._plan is not None and self._plan[1].breaks != self._break_specs():
            self._plan = None

    def note_gradients(self, names: Iterable[str], missing: str) -> None:
        """Correct the account of parameters that have a gradient, though no graph uses them and the
        model's output does not show the use, as long as that is so.

        Args:
            missing: why the last forward pass gave no statistics, where that is known.
        """
        self._names.refresh_if_changed()
        unused = {g.name for g in self.plan.generic if g.reason == NOT_USED}
        if found := unused.intersection(names):
            self._with_gradient |= dict.fromkeys(found, missing)
            self._plan = None

    def _built(self, parameters: list[ParameterSpec]) -> CurvaturePlan:
        uses = self._uses()
        plan = build_plan(
            parameters,
            uses,
            norm_layers=self._options.norm_layers,
            weight_sharing=self._options.weight_sharing,
            batch_dim=self._options.input_batch_dim,
        )
        if self._options.strict:
            refuse_generic_layers(plan, uses)
        generic = tuple(map(self._explained, plan.generic))
        return replace(
            plan, generic=generic, graphs=self._graph_specs(), breaks=self._break_specs()
        )

    def _uses(self) -> list[GraphUses]:
        own = {name for name, _ in self._model.named_parameters()}
        uses = [
            binding.uses
            for graph in self.graphs
            for binding in graph.bindings.values()
            if own.issuperset(binding.parameters.values())  # else of a model as it was before
        ]
        return [*uses, GraphUses((), tuple(self._outside.values()))]

    def _explained(self, generic: GenericSpec) -> GenericSpec:
        """The account of a parameter that no graph uses and that has had a gradient."""
        if generic.reason != NOT_USED or generic.name not in self._with_gradient:
            return generic
        missing = self._with_gradient[generic.name]
        use = use_outside(generic.name, "", self._breaks.breaks)
        return replace(generic, reason=missing or f"used by {use}")

    def _graph_specs(self) -> tuple[GraphSpec, ...]:
        return tuple(
            GraphSpec(graph.layer, len(graph.bindings), len(graph.first.uses.sites))
            for graph in self.graphs
        )

    def _break_specs(self) -> tuple[BreakSpec, ...]:
        alone = self._layers.alone
        return tuple(
            BreakSpec(
                place=found.place,
                function=found.function,
                skipped=found.skipped,
                reason=found.reason,
                alone=tuple(path for path, frame in alone.items() if frame == found.frame),
            )
            for found in self._breaks.breaks
        )

    def _parameter_specs(self) -> list[ParameterSpec]:
        """All parameters of the model as they are now."""
        return [
            ParameterSpec(name, tuple(p.shape), p.requires_grad, p.is_complex())
            for name, p in self._model.named_parameters()
        ]

    def _note_uses_outside(self, output: object, call: Call) -> None:
        """Take note of the parameters that plain Python used, where no graph held the use."""
        tensors = float_tensors(output).values()  # of dataclasses too, which are no pytrees
        for parameter, node in uses_outside(tensors, call.first_node, call.graphs):
            name = self._names.name_of(parameter)
            if name and (name, node) not in self._outside:
                self._outside[name, node] = use_outside(name, node, self._breaks.breaks)
                self._plan = None
