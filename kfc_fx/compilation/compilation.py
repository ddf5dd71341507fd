"""What the compiler knows of one model: its graphs, their bindings, the plan, what emits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfc_fx.capture.canonicalise import canonicalise
from kfc_fx.capture.concrete_numbers import number_inputs
from kfc_fx.capture.dynamo import (
    compile_emitting,
    compile_forward,
    compile_plain,
    dynamo_settings,
    forget_frames,
    mark_batch_dynamic,
    tensors_of_nodes,
)
from kfc_fx.capture.graph import Stage, copy_graph
from kfc_fx.capture.graph_breaks import BreakLog, GraphBreak, frame_of
from kfc_fx.capture.graph_passes import run_passes
from kfc_fx.capture.layer_captures import LayerCaptures
from kfc_fx.capture.parameter_names import ParameterNames
from kfc_fx.capture.preserved_state import state_preserved
from kfc_fx.capture.symbolic import refuse_to_run, symbolic_graph
from kfc_fx.compilation.bindings import Call, binding_of, parameter_inputs
from kfc_fx.compilation.captured_graph import CapturedGraph, GraphBinding
from kfc_fx.compilation.uses_outside import next_number, use_outside, uses_outside
from kfc_fx.errors import CaptureError
from kfc_fx.plan.coverage import NOT_USED, build_plan, refuse_generic_layers
from kfc_fx.plan.forms import FactorForms, factor_forms, statistic_shapes
from kfc_fx.plan.sharing import SharingOption
from kfc_fx.plan.spec import (
    BlockSpec,
    BreakSpec,
    CurvaturePlan,
    GenericSpec,
    GraphSpec,
    GraphUses,
    ParameterSpec,
    UnmatchedUse,
)
from kfc_fx.rewrite.emitting import Emitters, counts_of_spans, emission_order, emitting_stages
from kfc_fx.statistics.collector import StatisticsRecorder
from kfc_fx.statistics.fisher_pass import REENTRANT
from kfc_fx.statistics.inputs import batch_size
from kfc_fx.statistics.likelihood import Likelihood
from kfc_fx.statistics.outputs import float_tensors
from kfc_fx.statistics.sums import ForwardRecord

FormsOf = Callable[[BlockSpec], FactorForms | None]


@dataclass(frozen=True)
class CompileOptions:
    """How a model is compiled; see :func:`kfc_fx.compile`."""

    likelihood: Likelihood
    backend: str
    strict: bool
    norm_layers: bool
    weight_sharing: SharingOption


STARTS_ANEW = (
    torch._dynamo.exc.RestartAnalysis,
    torch._dynamo.exc.SkipFrame,
    torch._dynamo.exc.Unsupported,
)
"""How dynamo itself begins a frame anew, or leaves it."""


class Compilation:
    """Captures a model and runs it, on an armed step with statistics of the graphs it runs.

    Args:
        model: the module as the user wrote it; it is called, and not changed.
    """

    def __init__(self, model: nn.Module, options: CompileOptions) -> None:
        self.model, self.options = model, options
        self.recorder = StatisticsRecorder(options.likelihood)
        self.names = ParameterNames(model)
        self.breaks = BreakLog()
        self.layers = LayerCaptures(model, self._capture)
        self._forward = self._capture(model)
        self._graphs: list[CapturedGraph] = []
        self._outside: dict[tuple[str, str], UnmatchedUse] = {}
        self._with_gradient: dict[str, str] = {}
        self._called = False
        self._plan: tuple[object, CurvaturePlan] | None = None
        self._forms_of: FormsOf = factor_forms
        self._chosen: tuple[object, Emitters] | None = None
        self._call: Call | None = None
        self._interrupted: Call | None = None
        self._backward_passes = 0
        self._watching = ExitStack()

    # -- calls -------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass; on an armed step with statistics."""
        if not torch.is_grad_enabled() and self.options.backend == "eager":
            return self.model(*args, **kwargs)  # nothing to capture for, nothing to compile
        recorder = self.recorder
        if recorder.keep_inputs:
            recorder.last_inputs = (args, kwargs)
        if not (recorder.armed and torch.is_grad_enabled()):
            return self._run(args, kwargs, recording=False)
        with recorder.forward_pass(batch_size((args, kwargs))) as record:
            output = self._run(args, kwargs, recording=True)
        self._drop_changed(record)
        if self.layers.watch.in_function and record.fisher == "sampled":
            record.missing = REENTRANT
        elif self.layers.watch.in_function:
            record.again = self._again
        elif record.graphs == 0:
            record.missing = self._why_nothing_ran()
        return recorder.tap(output, record)

    def trace(self, *args: Any, **kwargs: Any) -> CurvaturePlan:
        """Capture the model for example inputs; buffers and random numbers stay as they were.

        Raises:
            CaptureError: dynamo captured no graph of the model.
        """
        self.names.refresh()
        with state_preserved(self.model), torch.enable_grad():
            self._run(args, kwargs, recording=True)
        return self.plan

    def trace_symbolic(self, *inputs: Tensor) -> CurvaturePlan:
        """Capture the model by ``symbolic_trace``; it then refuses to run."""
        module = symbolic_graph(self.model, inputs)
        missing = sum(node.op == "placeholder" for node in module.graph.nodes) - len(inputs)
        self._handle_graph("", module, [*inputs, *(None,) * missing])
        self._forward = refuse_to_run
        return self.plan

    def collect_statistics(self, *args: Any, **kwargs: Any) -> None:
        """Add the statistics of one batch, with sampled targets, to those of the next step.

        Buffers and random number generators are left as they were.
        """
        recorder = self.recorder
        with state_preserved(self.model), torch.enable_grad():
            with recorder.forward_pass(batch_size((args, kwargs)), fisher="sampled") as record:
                output = self._run(args, kwargs, recording=True)
            self._drop_changed(record)
            recorder.collect(output, record)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, recording: bool) -> Any:
        mark_batch_dynamic(args, kwargs)
        outer, call = self._call, Call(len(self._graphs), next_number())
        self._call, known = call, self.breaks.breaks
        try:
            with (
                dynamo_settings(),
                self.breaks.watching(),
                self.layers.installed(recording=recording),
            ):
                output = self._forward(*args, **kwargs)
        except Exception as error:
            self._take_back(known, error.__traceback__)
            raise
        finally:
            self._call = outer
            if outer is not None:  # a call of the model within a call of the model
                outer.graphs.append((call.first_node, next_number()))
        if call.failure is not None:
            raise call.failure
        self._called = self._called or torch.is_grad_enabled()
        grown = len(self._graphs) > call.first_graph
        if recording or (grown and not self.layers.watch.passed_by):
            self._account(output, call)
        return output

    def _take_back(self, known: tuple[GraphBreak, ...], traceback: TracebackType | None) -> None:
        """Forget which frames dynamo gave up in a call that failed: the fault was the input's.

        Args:
            known: the breaks from before the call.
            traceback: of the error, which holds the frames that failed.
        """
        if self.breaks.breaks == known:
            return
        self.breaks.forget_all_but(known)
        forget_frames(traceback)
        self._forward = self._capture(self.model)
        self.layers.capture_anew()

    def _account(self, output: Any, call: Call) -> None:
        """Look for what plain Python did in a call, where there was any between the graphs."""
        if self.breaks.breaks or self.layers.alone or not self._graphs:
            forwards = (frame_of(module) for module in self.model.modules())
            self.breaks.recall(filter(None, forwards))
            self._note_uses_outside(output, call)
        if self._plan is not None and self._plan[1].breaks != self._break_specs():
            self._plan = None

    @contextmanager
    def _again(self, record: ForwardRecord) -> Iterator[None]:
        """While it lasts, layers that are called within the backward pass emit for a record, as
        those do whose checkpoint is reentrant."""
        with self.recorder.continued(record), self._within_backward():
            yield

    @contextmanager
    def _within_backward(self) -> Iterator[None]:
        """Watch layers in a backward pass, or in several that overlap."""
        if not self._backward_passes:
            self._watching.enter_context(dynamo_settings())
            self._watching.enter_context(self.layers.installed(recording=True))
            self._interrupted, self._call = self._call, Call(len(self._graphs), next_number())
        self._backward_passes += 1
        try:
            yield
        finally:
            self._backward_passes -= 1
            if not self._backward_passes:
                ended, self._call = self._call, self._interrupted
                self._watching.close()
                if ended is not None and ended.failure is not None:
                    raise ended.failure

    def _drop_changed(self, record: ForwardRecord) -> None:
        """Drop the statistics of blocks that a later graph of the pass has made others."""
        now = {block.name: replace(block, uses=0) for block in self._plan_if_any()}
        for name, (block, _) in list(record.emitted.items()):
            if now.get(name) != replace(block, uses=0):
                record.drop(name)

    def _plan_if_any(self) -> tuple[BlockSpec, ...]:
        return self.plan.blocks if self._graphs else ()

    def _note_uses_outside(self, output: Any, call: Call) -> None:
        """Take note of the parameters that plain Python used, where no graph held the use."""
        tensors = float_tensors(output)  # of dataclasses too, which are no pytrees
        for parameter, node in uses_outside(tensors, call.first_node, call.graphs):
            if name := self.names.name_of(parameter):
                self._note_outside(name, node)

    def note_gradients(self, names: Iterable[str]) -> None:
        """Correct the account of parameters that have a gradient, though no graph uses them and the
        model's output does not show the use, as long as that is so."""
        self.names.refresh_if_changed()
        unused = {g.name for g in self.plan.generic if g.reason == NOT_USED}
        if found := unused.intersection(names):
            self._with_gradient |= dict.fromkeys(found, self.recorder.missing)
            self._plan = None

    def _note_outside(self, name: str, node: str) -> None:
        if (name, node) not in self._outside:
            self._outside[name, node] = use_outside(name, node, self.breaks.breaks)
            self._plan = None

    def _why_nothing_ran(self) -> str:
        """The reasons for which the forward pass ran outside of all graphs."""
        if self.recorder.missing:
            return self.recorder.missing
        found = "; ".join(str(b) for b in self.breaks.breaks if b.skipped)
        return (
            "the forward pass ran outside the captured graphs, so no statistics can be taken: "
            + (found or "dynamo captured nothing (is it disabled, by TORCHDYNAMO_DISABLE=1?)")
        )

    # -- what the compiler did ---------------------------------------------------------------

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        """Captured graphs in the order of their capture, each with its stages."""
        for graph in self._graphs:
            for binding in graph.bindings.values():
                self._emitting(graph, binding)
        return tuple(self._graphs)

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return bool(self._graphs)

    @property
    def revision(self) -> int:
        """Grows with every graph, binding and use that is found; the plan may change then."""
        return len(self._outside) + sum(1 + len(graph.bindings) for graph in self._graphs)

    @property
    def plan(self) -> CurvaturePlan:
        """The account of every parameter over all graphs captured so far.

        Raises:
            CaptureError: nothing was captured yet.
        """
        if not self._graphs:
            raise CaptureError(self._why_nothing_captured())
        parameters = self.parameter_specs()
        if self._plan is None or self._plan[0] != parameters:
            uses = self._uses()
            plan = build_plan(
                parameters,
                uses,
                norm_layers=self.options.norm_layers,
                weight_sharing=self.options.weight_sharing,
            )
            if self.options.strict:
                refuse_generic_layers(plan, uses)
            generic = tuple(map(self._explained, plan.generic))
            plan = replace(
                plan, generic=generic, graphs=self._graph_specs(), breaks=self._break_specs()
            )
            self._plan = (parameters, plan)
        return self._plan[1]

    def _explained(self, generic: GenericSpec) -> GenericSpec:
        """The account of a parameter that no graph uses and that has had a gradient."""
        if generic.reason != NOT_USED or generic.name not in self._with_gradient:
            return generic
        missing = self._with_gradient[generic.name]
        use = use_outside(generic.name, "", self.breaks.breaks)
        return replace(generic, reason=missing or f"used by {use}")

    def _graph_specs(self) -> tuple[GraphSpec, ...]:
        return tuple(
            GraphSpec(graph.layer, len(graph.bindings), len(graph.first.uses.sites))
            for graph in self._graphs
        )

    def _break_specs(self) -> tuple[BreakSpec, ...]:
        alone = self.layers.alone
        return tuple(
            BreakSpec(
                place=found.place,
                function=found.function,
                skipped=found.skipped,
                reason=found.reason,
                alone=tuple(path for path, frame in alone.items() if frame == found.frame),
            )
            for found in self.breaks.breaks
        )

    def _uses(self) -> list[GraphUses]:
        uses = [b.uses for graph in self._graphs for b in graph.bindings.values()]
        return [*uses, GraphUses((), tuple(self._outside.values()))]

    def _why_nothing_captured(self) -> str:
        if self._called:
            return (
                f"nothing of the model could be captured: {self._why_nothing_ran()}. Change what "
                "is named, or train this model by torch.optim"
            )
        return (
            "nothing is captured yet: run a forward pass with gradients enabled, or call "
            "compiled.trace(*example_inputs)"
        )

    @property
    def forms_of(self) -> FormsOf:
        """The forms of a block's factors, None for a block that emits none."""
        return self._forms_of

    @forms_of.setter
    def forms_of(self, choose: FormsOf) -> None:
        self._forms_of, self._chosen = choose, None

    def parameter_specs(self) -> list[ParameterSpec]:
        """All parameters of the model as they are now."""
        return [
            ParameterSpec(name, tuple(p.shape), p.requires_grad, p.is_complex())
            for name, p in self.model.named_parameters()
        ]

    def _emitters(self) -> Emitters:
        """Blocks that emit, by the name of their weight; within a pass computed once."""
        passes = self.recorder.passes if self.recorder.recording else None
        key = (passes, self.revision)
        if passes is None or self._chosen is None or self._chosen[0] != key:
            chosen = ((block, self._forms_of(block)) for block in self.plan.blocks)
            found = {b.weight: (b, forms) for b, forms in chosen if forms is not None}
            self._chosen = (key, found)
        return self._chosen[1]

    # -- graphs ------------------------------------------------------------------------------

    def _capture(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs a forward pass in graphs.

        All have one handler, so that dynamo takes its graphs of the frames that they share for one
        compiler's.
        """
        captured = compile_forward(forward, self._handle)
        self.breaks.stands_for(captured.__name__, forward)
        return captured

    def _handle(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Backend of dynamo, which may swallow what it raises: that is kept, to be raised later."""
        try:
            return self._handle_graph(self.layers.watch.layer, module, example_inputs)
        except STARTS_ANEW:
            raise
        except Exception as error:
            if self._call is not None:
                self._call.failure = error
            raise

    def _handle_graph(
        self, layer: str, module: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Backend of dynamo: keep the graph, and return what runs in its place."""
        self.breaks.note_graph(module)
        captured = Stage("captured", copy_graph(module))
        canonical = run_passes(captured.module, [("canonical", canonicalise)])
        positions = parameter_inputs(example_inputs, self.names)
        given, held = tensors_of_nodes(captured.module, example_inputs)
        nodes = list(given)
        holding = {*held, *(nodes[position] for position in positions)}
        graph = CapturedGraph(
            index=len(self._graphs),
            layer=layer,
            captured=[captured, *canonical],
            parameter_positions=positions,
            number_positions=number_inputs(canonical[-1].module, holding),
            run=compile_plain(self._backend(layer), module, example_inputs),
        )
        self._binding(graph, tuple(example_inputs))
        self._graphs.append(graph)
        self._plan = None
        return lambda *inputs: self._run_graph(graph, inputs)

    def _backend(self, layer: str) -> str:
        """What runs a graph: a layer by itself gains nothing by being compiled."""
        return "eager" if layer else self.options.backend

    def _binding(self, graph: CapturedGraph, inputs: tuple[Any, ...]) -> GraphBinding:
        """The graph with the names of the parameters that it is run with."""
        constants = self._call.constants_among(inputs) if self._call else ()
        known = len(graph.bindings)
        binding = binding_of(graph, inputs, self.names, constants)
        if len(graph.bindings) > known:
            self._plan = None
        return binding

    def _run_graph(self, graph: CapturedGraph, inputs: tuple[Any, ...]) -> Any:
        binding, call = self._binding(graph, inputs), self._call
        start = next_number()
        outputs = self._run_binding(graph, binding, inputs)
        if call is not None:
            call.graphs.append((start, next_number()))
            call.note_constants(outputs[position] for position in binding.without_examples)
        return outputs

    def _run_binding(
        self, graph: CapturedGraph, binding: GraphBinding, inputs: tuple[Any, ...]
    ) -> Any:
        record = self.recorder.recording
        if record is None or not torch.is_grad_enabled():
            return graph.run(*inputs)
        record.graphs += 1
        emitters = self._emitters()
        order = emission_order(binding.uses.sites, emitters)
        if not order:
            return graph.run(*inputs)
        gated = self._backend(graph.layer) != "eager"
        probes: list[Tensor] = []
        for weight in order:
            record.emitted[emitters[weight][0].name] = emitters[weight]
            if emitters[weight][1].output == "absent":
                continue
            parameter = self.model.get_parameter(weight)
            probes += self.recorder.probes_for(*emitters[weight], parameter, gated=gated)
        outputs, rows, *returned = self._emitting(graph, binding)(*inputs, *probes)
        sites = [site for site in binding.uses.sites if site.weight in emitters]
        blocks = [emitters[site.weight][0] for site in sites]
        spans = [block.span(site) for block, site in zip(blocks, sites, strict=True)]
        self.recorder.note_rows(*counts_of_spans(blocks, spans, rows))
        alone = [emitters[s.weight] for s in sites if emitters[s.weight][1].output == "absent"]
        for (block, forms), values in zip(alone, *returned or [()], strict=True):
            names = statistic_shapes(block, forms)
            self.recorder.note_inputs(block, dict(zip(names, values, strict=True)))
        return outputs

    def _emitting(self, graph: CapturedGraph, binding: GraphBinding) -> Callable[..., Any]:
        emitters = self._emitters()
        key = tuple(emitters[w] for w in emission_order(binding.uses.sites, emitters))
        if key not in binding.emitting:
            binding.stages = emitting_stages(binding.canonical, binding.uses.sites, emitters)
            module = binding.stages[-1].module
            binding.emitting[key] = compile_emitting(self._backend(graph.layer), module)
        return binding.emitting[key]
