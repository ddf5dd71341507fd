"""Runs of a model in captured graphs, and on an armed pass in those that emit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from kfc_fx.capture.entries import Inside
from kfc_fx.capture.graph import Stage, copy_graph
from kfc_fx.capture.graph_breaks import BreakLog, GraphBreak
from kfc_fx.capture.graph_passes import run_passes
from kfc_fx.capture.layer_captures import LayerCaptures
from kfc_fx.capture.nodes import place_in_model
from kfc_fx.capture.parameter_names import ParameterNames
from kfc_fx.capture.symbolic import refuse_to_run
from kfc_fx.compilation.account import Account
from kfc_fx.compilation.armed_pass import ArmedPass, OwnerOf
from kfc_fx.compilation.bindings import Call, binding_of, parameter_inputs
from kfc_fx.compilation.captured_graph import BoundGraph, CapturedGraph, GraphBinding
from kfc_fx.compilation.layer_work import layer_flops
from kfc_fx.compilation.options import CompileOptions
from kfc_fx.compilation.uses_outside import next_number
from kfc_fx.rewrite.emitting import Emitters
from kfc_fx.statistics.running import forward_shares

STARTS_ANEW = (
    torch._dynamo.exc.RestartAnalysis,
    torch._dynamo.exc.SkipFrame,
    torch._dynamo.exc.Unsupported,
)
"""How dynamo itself begins a frame anew, or leaves it."""


class Runs:
    """Captures a model and runs it.

    Args:
        names: of its parameters.
        owner_of: parameter name to the collector that its statistics are for.
    """

    def __init__(
        self, model: nn.Module, options: CompileOptions, names: ParameterNames, owner_of: OwnerOf
    ) -> None:
        self._model, self._options, self._names, self._owner_of = model, options, names, owner_of
        self.breaks: BreakLog = BreakLog()
        self.layers: LayerCaptures = LayerCaptures(model, self._capture)
        self.account: Account = Account(model, options, names, self.breaks, self.layers)
        self.called: bool = False
        """Whether the model was called with gradients enabled."""
        self.inside: Inside = Inside()
        self._forward = self._capture(model._call_impl)
        self._entries: dict[nn.Module, Callable[..., Any]] = {}
        self._passes: list[ArmedPass] = []
        self._call: Call | None = None
        self._interrupted: Call | None = None
        self._backward_passes = 0
        self._watching = ExitStack()

    @property
    def runs(self) -> bool:
        """Whether the model runs: not after :meth:`keep_symbolic`."""
        return self._forward is not refuse_to_run

    # -- calls -------------------------------------------------------------------------------

    @contextmanager
    def recording(self, running: ArmedPass) -> Iterator[None]:
        """While it lasts, graphs that run emit for a pass: those of its forward pass, and of its
        backward pass where a checkpoint is reentrant. Backward passes may end in any order."""
        self._passes.append(running)
        try:
            with forward_shares(running.share_of):
                yield
        finally:
            self._passes.remove(running)

    def call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        recording: bool,
        entry: tuple[str, nn.Module] | None = None,
    ) -> Any:
        """The output of the model, or of a module of it.

        Args:
            recording: watch the layers that plain Python calls, and account for what it uses.
            entry: path of the module that is called, and the module; None for the model.
        """
        mark_batch_dynamic(args, kwargs, self._options.input_batch_dim)
        path, module = entry or ("", self._model)
        outer, call = self._call, Call(module, len(self.account.graphs), next_number())
        self._call, known = call, self.breaks.breaks
        self.inside.depth += 1
        try:
            with (
                dynamo_settings(self._options.backend),
                self.breaks.watching(),
                self.layers.installed(recording=recording, within=path),
            ):
                output = self._forward_of(module)(*args, **kwargs)
        except Exception as error:
            self._take_back(known, error.__traceback__)
            raise
        finally:
            self.inside.depth -= 1
            self._call = outer
            if outer is not None:  # a call of the model within a call of the model
                outer.graphs.append((call.first_node, next_number()))
        if call.failure is not None:
            raise call.failure
        self.called = self.called or torch.is_grad_enabled()
        grown = len(self.account.graphs) > call.first_graph
        if recording or (grown and not self.layers.watch.passed_by):
            self.account.note_call(output, call)
        return output

    def _forward_of(self, module: nn.Module) -> Callable[..., Any]:
        if module is self._model:
            return self._forward
        if module not in self._entries:
            self._entries[module] = self._capture(module._call_impl)
        return self._entries[module]

    def keep_entries(self, modules: Collection[nn.Module]) -> None:
        """Hold no captures of other modules than these any longer."""
        self._entries = {module: own for module, own in self._entries.items() if module in modules}

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
        self._forward = self._capture(self._model._call_impl)
        self._entries.clear()
        self.layers.capture_anew()

    @contextmanager
    def again(self, running: ArmedPass) -> Iterator[None]:
        """While it lasts, layers that are called within the backward pass emit for a pass, as
        those do whose checkpoint is reentrant."""
        with self.recording(running), self._within_backward():
            yield

    @contextmanager
    def _within_backward(self) -> Iterator[None]:
        """Watch layers in a backward pass, or in several that overlap."""
        if not self._backward_passes:
            self._watching.enter_context(dynamo_settings(self._options.backend))
            self._watching.enter_context(self.layers.installed(recording=True))
            call = Call(self._model, len(self.account.graphs), next_number())
            self._interrupted, self._call = self._call, call
        self._backward_passes += 1
        self.inside.depth += 1
        try:
            yield
        finally:
            self._backward_passes -= 1
            self.inside.depth -= 1
            if not self._backward_passes:
                ended, self._call = self._call, self._interrupted
                self._watching.close()
                if ended is not None and ended.failure is not None:
                    raise ended.failure

    # -- graphs ------------------------------------------------------------------------------

    def keep_symbolic(self, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Take the graph of a symbolic trace; the model then refuses to run."""
        self._handle_graph("", module, inputs)
        self._forward = refuse_to_run

    def emitting_graphs(self, emitters: Emitters) -> tuple[BoundGraph, ...]:
        """Every captured graph under each of its bindings, with the stages of its emitting graph.

        Args:
            emitters: what is to emit; an emitting graph that there is not yet is built, and not
                run.
        """
        found = []
        for graph in self.account.graphs:
            for binding in graph.bindings.values():
                emitting = binding.emitting_for(emitters, self._backend(graph.layer))
                stages = (*graph.captured, *(emitting.stages if emitting else ()))
                found.append(BoundGraph(graph.layer, stages, binding.parameters, binding.uses))
        return tuple(found)

    def _capture(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs a forward pass in graphs.

        All have one handler, so that dynamo takes its graphs of the frames that they share for one
        compiler's.
        """
        captured = compile_forward(forward, self._handle)
        module = getattr(forward, "__self__", None)
        if isinstance(module, nn.Module) and forward == module._call_impl:
            forward = module
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
        self._names.refresh_if_renamed()
        self.breaks.note_graph(module)
        captured = Stage("captured", copy_graph(module))
        if not layer:
            called = self._call.module if self._call is not None else self._model
            place_in_model(captured.module, type(called))
        canonical = run_passes(captured.module, [("canonical", canonicalise)])
        positions = parameter_inputs(example_inputs, self._names)
        given, held = tensors_of_nodes(captured.module, example_inputs)
        nodes = list(given)
        holding = {*held, *(nodes[position] for position in positions)}
        graph = CapturedGraph(
            index=len(self.account.graphs),
            layer=layer,
            captured=[captured, *canonical],
            parameter_positions=positions,
            number_positions=number_inputs(canonical[-1].module, holding),
            run=compile_plain(self._backend(layer), module, example_inputs),
        )
        self._binding(graph, tuple(example_inputs))
        self.account.graphs.append(graph)
        self.account.note_change()
        return lambda *inputs: self._run_graph(graph, inputs)

    def _backend(self, layer: str) -> str:
        """What runs a graph: a layer by itself gains nothing by being compiled."""
        return "eager" if layer else self._options.backend

    def _binding(self, graph: CapturedGraph, inputs: tuple[Any, ...]) -> GraphBinding:
        """The graph with the names of the parameters that it is run with."""
        constants = self._call.constants_among(inputs) if self._call else ()
        known = len(graph.bindings)
        binding = binding_of(graph, inputs, self._names, constants, self._options.input_batch_dim)
        if len(graph.bindings) > known:
            self.account.note_change()
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
        running.note_layers(layer_flops(binding.uses.sites, self._model))
        emitters = running.emitters(self.account.plan.blocks, self._owner_of, self.account.revision)
        emitting = binding.emitting_for(emitters, self._backend(graph.layer))
        if emitting is None:
            return graph.run(*inputs)
        for block, forms in emitting.emitters:
            weight = self._model.get_parameter(block.weight)
            running.record_of(block.name).note_emission(block, forms, weight)
        probes: list[Tensor] = []
        for block, forms in emitting.probed:
            parameter = self._model.get_parameter(block.weight)
            probes += running.probes_for(block, forms, parameter)
        shares = tuple(running.share_of(b.name, traced=True) for b, _ in emitting.emitters)
        emitted = emitting(inputs, probes, shares, by_op=running.is_early)
        running.note(emitted)
        return emitted.outputs
