"""What the compiler knows of one model: its graphs, their bindings, the plan, what emits."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from html import escape
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfc_fx.capture.canonicalise import canonicalise
from kfc_fx.capture.concrete_numbers import number_inputs
from kfc_fx.capture.dynamo import (
    compile_forward,
    compile_plain,
    dynamo_settings,
    forget_frames,
    mark_batch_dynamic,
    tensors_of_nodes,
)
from kfc_fx.capture.graph import Stage, copy_graph
from kfc_fx.capture.graph_breaks import BreakLog, GraphBreak
from kfc_fx.capture.graph_passes import run_passes
from kfc_fx.capture.layer_captures import LayerCaptures
from kfc_fx.capture.nodes import place_in_model
from kfc_fx.capture.parameter_names import ParameterNames
from kfc_fx.capture.preserved_state import state_preserved
from kfc_fx.capture.symbolic import refuse_to_run, symbolic_graph
from kfc_fx.compilation.account import Account
from kfc_fx.compilation.armed_pass import ArmedPass
from kfc_fx.compilation.bindings import Call, binding_of, parameter_inputs
from kfc_fx.compilation.captured_graph import BoundGraph, CapturedGraph, GraphBinding
from kfc_fx.compilation.options import CompileOptions
from kfc_fx.compilation.owners import Owners
from kfc_fx.compilation.uses_outside import next_number
from kfc_fx.errors import CaptureError, OptionError, counted
from kfc_fx.plan.forms import FactorForms, factor_forms
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan
from kfc_fx.rewrite.emitting import Emitters
from kfc_fx.statistics.collector import Collector
from kfc_fx.statistics.fisher_pass import REENTRANT
from kfc_fx.statistics.inputs import batch_size
from kfc_fx.statistics.request import StatisticsRequest
from kfc_fx.statistics.running import forward_shares
from kfc_fx.statistics.tap import collect, tap

STARTS_ANEW = (
    torch._dynamo.exc.RestartAnalysis,
    torch._dynamo.exc.SkipFrame,
    torch._dynamo.exc.Unsupported,
)
"""How dynamo itself begins a frame anew, or leaves it."""


_INSTALLED_ONES: weakref.WeakSet[Compilation] = weakref.WeakSet()
_SERIAL = itertools.count()

INSTALLED = "_compiled_call_impl"
"""What ``nn.Module`` calls in place of ``_call_impl`` where it is set."""


class Compilation:
    """What the compiler knows of a model: ``model.kfc``.

    It captures the model and runs it, on an armed step with statistics of the graphs that it runs.
    The model's own call, hooks and all, is what is captured; only what ``nn.Module`` calls in its
    place is set on the model.

    Args:
        model: whose calls it takes once it is installed.
    """

    def __init__(self, model: nn.Module, options: CompileOptions) -> None:
        self.model, self.options = model, options
        self.serial = next(_SERIAL)
        """Larger for compilations that were made later."""
        self._before: Callable[..., Any] | None = None
        self.names = ParameterNames(model)
        self._owners = Owners()
        self._breaks = BreakLog()
        self._layers = LayerCaptures(model, self._capture)
        self._account = Account(model, options, self.names, self._breaks, self._layers)
        self._forward = self._capture(model._call_impl)
        self._called = False
        self._passes: list[ArmedPass] = []
        self._call: Call | None = None
        self._interrupted: Call | None = None
        self._backward_passes = 0
        self._watching = ExitStack()

    # -- on the model ------------------------------------------------------------------------

    @classmethod
    def of(cls, model: nn.Module) -> Compilation:
        """What the compiler knows of a model: ``model.kfc``, typed.

        Raises:
            OptionError: the model is not compiled.
        """
        found = vars(model).get("kfc")
        if not (isinstance(found, cls) and found.model is model):
            raise OptionError(
                f"this {type(model).__name__} is not compiled: call kfc_fx.compile(model) first"
            )
        return found

    @staticmethod
    def installed_ones() -> list[Compilation]:
        """Those of all compiled models that are alive, in the order in which they were made."""
        alive = [compilation for compilation in _INSTALLED_ONES if compilation.known_to_model]
        return sorted(alive, key=lambda compilation: compilation.serial)

    @property
    def installed(self) -> bool:
        """Whether the model's calls come here."""
        return vars(self.model).get(INSTALLED) is self

    @property
    def runs(self) -> bool:
        """Whether the model runs: not after :meth:`trace_symbolic`, which is for looking."""
        return self._forward is not refuse_to_run

    @property
    def known_to_model(self) -> bool:
        """Whether the model is still compiled by this compilation."""
        return vars(self.model).get("kfc") is self

    @property
    def why_not_called(self) -> str:
        """What to do where no call of the model has come here, in one sentence."""
        if not self.installed:
            return (
                "model.compile() was called after kfc_fx.compile and takes the model's calls: "
                "leave it out, and pass backend='inductor' to kfc_fx.compile"
            )
        return (
            "call the model with gradients enabled, after KFC was made, and compute the loss from "
            "what it returns; torch.compile around the model or around the training step traces "
            "past kfc_fx, and kfc_fx.compile(model, backend='inductor') takes its place"
        )

    def install(self) -> None:
        """Let the model's calls come here; what was called before is put aside."""
        own = vars(self.model)
        self._before = own.get(INSTALLED)
        own[INSTALLED] = own["kfc"] = self
        _INSTALLED_ONES.add(self)

    def remove(self) -> None:
        """Leave the model as it was."""
        own = vars(self.model)
        if self.installed and self._before is None:
            del own[INSTALLED]
        elif self.installed:
            own[INSTALLED] = self._before
        own.pop("kfc", None)
        _INSTALLED_ONES.discard(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compilation:
        """Of a model that is being copied: the copy's own, on the copy."""
        model = memo.get(id(self.model))
        if model is None:
            return Compilation.of(copy.deepcopy(self.model, memo))
        return restored(model, self.options.as_given())

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self.model, self.options.as_given())

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.as_given().items())
        state = "not captured yet"
        if self.captured:
            graphs, blocks = len(self._account.graphs), len(self.plan.blocks)
            state = f"{counted(graphs, 'graph')}, {counted(blocks, 'block')}"
        return f"Compilation({type(self.model).__name__}: {state}; {given})"

    def _repr_html_(self) -> str:
        """The short summary, and the plan once there is one, for notebooks."""
        summary = f"<p><code>{escape(repr(self))}</code></p>"
        return summary + (self.plan._repr_html_() if self.captured else "")

    # -- for optimizers ----------------------------------------------------------------------

    def attach(
        self, request: StatisticsRequest, parameters: Iterable[str] | None = None
    ) -> Collector:
        """A new collector of statistics, for as long as the caller holds it.

        Args:
            request: what it asks for.
            parameters: names of those whose blocks it is for; None for all of the model, those that
                join it later too. An earlier collector takes no more statistics of these.
        """
        collector = Collector(self.options.likelihood, request)
        self._owners.assign(collector, parameters)
        return collector

    def assign(self, collector: Collector, parameters: Iterable[str]) -> None:
        """Give a collector the blocks of more parameters, by name."""
        self._owners.assign(collector, parameters)

    @property
    def collectors(self) -> tuple[Collector, ...]:
        """Those that take statistics of some parameter."""
        return self._owners.collectors

    @property
    def assignments(self) -> int:
        """How many times parameters were given to a collector: owners may differ after each."""
        return self._owners.assignments

    def owner_of(self, parameter: str) -> Collector | None:
        """The collector that takes the statistics of a parameter's block."""
        return self._owners.owner_of(parameter)

    def forms_of(self, block: BlockSpec) -> FactorForms | None:
        """The forms of a block's factors, None where no statistics are asked of it."""
        owner = self.owner_of(block.weight)
        return factor_forms(block) if owner is None else owner.request.forms(block)

    def note_gradients(self, names: Iterable[str]) -> None:
        """Let the plan say so of parameters that have gradients though no graph uses them."""
        self._account.note_gradients(names, self._missing)

    # -- calls -------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass; on an armed step with statistics."""
        if torch.compiler.is_dynamo_compiling():
            return self.model._call_impl(*args, **kwargs)  # a compiler around the model traces on
        if not torch.is_grad_enabled() and self.options.backend == "eager":
            # There is nothing to capture for, and nothing to compile.
            return self.model._call_impl(*args, **kwargs)
        for collector in self.collectors:
            collector.note_inputs((args, kwargs))
        armed = [collector for collector in self.collectors if collector.armed]
        if not (armed and torch.is_grad_enabled()):
            return self._run(args, kwargs, recording=False)
        examples = batch_size((args, kwargs))
        running = ArmedPass({collector: collector.begin(examples) for collector in armed})
        with self._recording(running):
            output = self._run(args, kwargs, recording=True)
        return self._tapped(output, running)

    def trace(self, *args: Any, **kwargs: Any) -> CurvaturePlan:
        """Capture the model for example inputs and build its emitting graphs; buffers and random
        numbers stay as they were.

        Raises:
            CaptureError: dynamo captured no graph of the model.
        """
        self.names.refresh()
        with state_preserved(self.model), torch.enable_grad():
            self._run(args, kwargs, recording=True)
        self.emitting_graphs()
        return self.plan

    def trace_symbolic(self, *inputs: Tensor) -> CurvaturePlan:
        """Capture the model by ``symbolic_trace``; it then refuses to run."""
        module = symbolic_graph(self.model, inputs)
        missing = sum(node.op == "placeholder" for node in module.graph.nodes) - len(inputs)
        self._handle_graph("", module, [*inputs, *(None,) * missing])
        self._forward = refuse_to_run
        self.emitting_graphs()
        return self.plan

    def collect_statistics(self, collector: Collector, *args: Any, **kwargs: Any) -> None:
        """Add the statistics of one batch, with sampled targets, to the sums of a collector.

        Buffers and random number generators are left as they were.
        """
        record = collector.begin(batch_size((args, kwargs)), fisher="sampled")
        running = ArmedPass({collector: record})
        with state_preserved(self.model), torch.enable_grad():
            with self._recording(running):
                output = self._run(args, kwargs, recording=True)
            running.drop_changed(self._blocks)
            collect(output, collector.setup(record))

    @contextmanager
    def _recording(self, running: ArmedPass) -> Iterator[None]:
        """While it lasts, graphs that run emit for a pass: those of its forward pass, and of its
        backward pass where a checkpoint is reentrant. Backward passes may end in any order."""
        self._passes.append(running)
        try:
            with forward_shares(running.share_of):
                yield
        finally:
            self._passes.remove(running)

    def _tapped(self, output: Any, running: ArmedPass) -> Any:
        """The output of an armed pass, through which its statistics are taken."""
        running.drop_changed(self._blocks)
        in_function = self._layers.watch.in_function
        for collector, record in running.records.items():
            if in_function and record.fisher == "sampled":
                record.missing = REENTRANT
            elif in_function:
                record.again = partial(self._again, running)
            elif running.graphs == 0:
                record.missing = self._why_nothing_ran()
            if record.missing:
                collector.note_missing(record.missing)
        setups = [c.setup(record) for c, record in running.records.items() if not record.missing]
        return tap(output, setups) if setups else output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, recording: bool) -> Any:
        mark_batch_dynamic(args, kwargs)
        outer, call = self._call, Call(len(self._account.graphs), next_number())
        self._call, known = call, self._breaks.breaks
        try:
            with (
                dynamo_settings(),
                self._breaks.watching(),
                self._layers.installed(recording=recording),
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
        grown = len(self._account.graphs) > call.first_graph
        if recording or (grown and not self._layers.watch.passed_by):
            self._account.note_call(output, call)
        return output

    def _take_back(self, known: tuple[GraphBreak, ...], traceback: TracebackType | None) -> None:
        """Forget which frames dynamo gave up in a call that failed: the fault was the input's.

        Args:
            known: the breaks from before the call.
            traceback: of the error, which holds the frames that failed.
        """
        if self._breaks.breaks == known:
            return
        self._breaks.forget_all_but(known)
        forget_frames(traceback)
        self._forward = self._capture(self.model._call_impl)
        self._layers.capture_anew()

    @contextmanager
    def _again(self, running: ArmedPass) -> Iterator[None]:
        """While it lasts, layers that are called within the backward pass emit for a pass, as
        those do whose checkpoint is reentrant."""
        with self._recording(running), self._within_backward():
            yield

    @contextmanager
    def _within_backward(self) -> Iterator[None]:
        """Watch layers in a backward pass, or in several that overlap."""
        if not self._backward_passes:
            self._watching.enter_context(dynamo_settings())
            self._watching.enter_context(self._layers.installed(recording=True))
            self._interrupted, self._call = (
                self._call,
                Call(len(self._account.graphs), next_number()),
            )
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

    @property
    def _missing(self) -> str:
        """Why the last armed forward pass gave no statistics, where that is known."""
        return next((c.missing for c in self.collectors if c.missing), "")

    def _why_nothing_ran(self) -> str:
        """The reasons for which the forward pass ran outside of all graphs."""
        if self._missing:
            return self._missing
        found = "; ".join(str(b) for b in self._breaks.breaks if b.skipped)
        return (
            "the forward pass ran outside the captured graphs, so no statistics can be taken: "
            + (found or "dynamo captured nothing (is it disabled, by TORCHDYNAMO_DISABLE=1?)")
        )

    # -- what the compiler did ---------------------------------------------------------------

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        """Captured graphs in the order of their capture, each with the stages that there are."""
        return tuple(self._account.graphs)

    def emitting_graphs(self) -> tuple[BoundGraph, ...]:
        """Every captured graph under each of its bindings, with the stages of the emitting graph
        for what is asked now. An emitting graph that there is not yet is built, and not run."""
        found, emitters = [], self._all_emitters()
        for graph in self._account.graphs:
            for binding in graph.bindings.values():
                emitting = binding.emitting_for(emitters, self._backend(graph.layer))
                stages = (*graph.captured, *(emitting.stages if emitting else ()))
                found.append(BoundGraph(graph.layer, stages, binding.parameters, binding.uses))
        return tuple(found)

    @property
    def breaks(self) -> tuple[GraphBreak, ...]:
        """Where Python runs between the graphs, and dynamo's reasons for it."""
        return self._breaks.breaks

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return bool(self._account.graphs)

    @property
    def revision(self) -> int:
        """Grows with every graph, binding and use that is found; the plan may change then."""
        return self._account.revision

    @property
    def plan(self) -> CurvaturePlan:
        """The account of every parameter over all graphs captured so far.

        Raises:
            CaptureError: nothing was captured yet.
        """
        if not self.captured:
            raise CaptureError(self._why_nothing_captured())
        return self._account.plan

    @property
    def _blocks(self) -> tuple[BlockSpec, ...]:
        return self._account.plan.blocks if self.captured else ()

    def _why_nothing_captured(self) -> str:
        if self._called:
            return (
                f"nothing of the model could be captured: {self._why_nothing_ran()}. Change what "
                "is named, or train this model by torch.optim"
            )
        return (
            "nothing is captured yet, by a call or by model.kfc.trace(*example_inputs): "
            + self.why_not_called
        )

    def _all_emitters(self) -> Emitters:
        """Every block that emits when all collectors are armed, by the name of its weight."""
        chosen = ((block, self.forms_of(block)) for block in self._blocks)
        return {block.weight: (block, forms) for block, forms in chosen if forms is not None}

    # -- graphs ------------------------------------------------------------------------------

    def _capture(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs a forward pass in graphs.

        All have one handler, so that dynamo takes its graphs of the frames that they share for one
        compiler's.
        """
        captured = compile_forward(forward, self._handle)
        frame = self.model if forward == self.model._call_impl else forward
        self._breaks.stands_for(captured.__name__, frame)
        return captured

    def _handle(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Backend of dynamo, which may swallow what it raises: that is kept, to be raised later."""
        try:
            return self._handle_graph(self._layers.watch.layer, module, example_inputs)
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
        self._breaks.note_graph(module)
        captured = Stage("captured", copy_graph(module))
        if not layer:
            place_in_model(captured.module, type(self.model))
        canonical = run_passes(captured.module, [("canonical", canonicalise)])
        positions = parameter_inputs(example_inputs, self.names)
        given, held = tensors_of_nodes(captured.module, example_inputs)
        nodes = list(given)
        holding = {*held, *(nodes[position] for position in positions)}
        graph = CapturedGraph(
            index=len(self._account.graphs),
            layer=layer,
            captured=[captured, *canonical],
            parameter_positions=positions,
            number_positions=number_inputs(canonical[-1].module, holding),
            run=compile_plain(self._backend(layer), module, example_inputs),
        )
        self._binding(graph, tuple(example_inputs))
        self._account.graphs.append(graph)
        self._account.note_change()
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
            self._account.note_change()
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
        running = self._passes[-1] if self._passes else None
        if running is None or not torch.is_grad_enabled():
            return graph.run(*inputs)
        running.graphs += 1
        emitters = running.emitters(self.plan.blocks, self.owner_of, self.revision)
        emitting = binding.emitting_for(emitters, self._backend(graph.layer))
        if emitting is None:
            return graph.run(*inputs)
        for block, forms in emitting.emitters:
            running.record_of(block.name).emitted[block.name] = (block, forms)
        probes: list[Tensor] = []
        for block, forms in emitting.probed:
            parameter = self.model.get_parameter(block.weight)
            probes += running.probes_for(block, forms, parameter)
        emitted = emitting(inputs, probes)
        running.note(emitted)
        return emitted.outputs


def restored(model: nn.Module, options: dict[str, Any]) -> Compilation:
    """A compilation anew on a copied or unpickled model, which may still be without its state.

    Args:
        options: as :meth:`CompileOptions.as_given` has them.
    """
    compilation = Compilation(model, CompileOptions.of(**options))
    compilation.install()
    return compilation


# A whole model is then loaded with weights_only=True if its own classes are known as safe.
torch.serialization.add_safe_globals([restored])
