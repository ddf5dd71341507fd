"""``kfc_fx.compile``: where capture, plan and rewrite meet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfc_fx.capture.canonicalise import canonicalise
from kfc_fx.capture.dynamo import (
    check_backend,
    compile_emitting,
    compile_forward,
    compile_plain,
    constant_nodes,
    mark_batch_dynamic,
    parameter_nodes,
)
from kfc_fx.capture.graph import CapturedGraph, Stage, copy_graph
from kfc_fx.capture.symbolic import refuse_to_run, symbolic_graph
from kfc_fx.curvature.inputs import batch_size
from kfc_fx.curvature.likelihood import CotangentFunction, Likelihood, resolve_likelihood
from kfc_fx.curvature.recorder import StatisticsRecorder
from kfc_fx.errors import CaptureError
from kfc_fx.plan.coverage import build_plan, refuse_generic_layers
from kfc_fx.plan.forms import FactorForms, factor_forms, statistic_shapes
from kfc_fx.plan.match import match_uses
from kfc_fx.plan.sharing import SharingOption, check_sharing
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan, ParameterSpec
from kfc_fx.rewrite.emission import Emitters, emission_order, emitting_stages
from kfc_fx.rewrite.pipeline import run_passes
from kfc_fx.rewrite.row_counts import counts_of_spans


def compile(
    model: nn.Module,
    *,
    likelihood: str | Likelihood | CotangentFunction = "categorical",
    backend: str = "eager",
    strict: bool = False,
    norm_layers: bool = True,
    weight_sharing: SharingOption = "expand",
) -> CompiledModel:
    """Prepare an existing model for training by KFC.

    Args:
        model: any module; it is neither copied nor changed.
        likelihood: predictive distribution of the output: ``"categorical"`` (class scores),
            ``"gaussian"`` (unit variance) or ``"bernoulli"`` (logits); or a function from the
            output to the cotangents, of its shape, of one sampled target per example.
        backend: what runs the captured graphs: ``"eager"``, ``"aot_eager"`` or ``"inductor"``.
        strict: raise at capture if the weight of a conv or linear call gets no block.
        norm_layers: give the scale and shift of norm layers a block, the exact Fisher matrix of
            each channel's two numbers; without it they are generic.
        weight_sharing: how linear layers treat locations (tokens, pixels) that share their
            weight: ``"expand"`` sums over them as a convolution does, ``"reduce"`` averages the
            inputs and sums the gradients first; or a mapping from globs on block names.

    Returns:
        A module with the model's call signature, the same parameter objects and the same
        ``state_dict`` keys. The model is captured at the first call with gradients enabled.

    Raises:
        OptionError: an unknown likelihood, backend or weight_sharing.
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"kfc_fx.compile takes an nn.Module, got {type(model).__name__}")
    if isinstance(model, CompiledModel):
        model = model.original
    check_backend(backend)
    check_sharing(weight_sharing)
    if not isinstance(weight_sharing, str):
        weight_sharing = dict(weight_sharing)
    resolved = resolve_likelihood(likelihood)
    return CompiledModel(model, resolved, backend, strict, norm_layers, weight_sharing)


FormsOf = Callable[[BlockSpec], FactorForms | None]

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Dictionaries that a compiled model shares with the original, so that every walk over
modules, parameters and state, its own or a parent module's, sees the original's."""


class CompiledModel(nn.Module):
    """A model whose captured graphs can emit factor statistics. Made by :func:`compile`."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        backend: str,
        strict: bool,
        norm_layers: bool,
        weight_sharing: SharingOption,
    ) -> None:
        own = self.__dict__
        own["original"] = model
        training = model.training
        super().__init__()
        model.training = training  # nn.Module's constructor sets the flag, which is the original's
        for name in _SHARED:
            own[name] = getattr(model, name)
        own["recorder"] = StatisticsRecorder(likelihood)
        own["_options"] = {
            "likelihood": likelihood,
            "backend": backend,
            "strict": strict,
            "norm_layers": norm_layers,
            "weight_sharing": weight_sharing,
        }
        own["_graphs"] = []
        own["_plan"] = None
        own["_forms_of"] = factor_forms
        own["_forward"] = compile_forward(model, self._handle_graph)

    # -- the model's calls ---------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; on an armed step with statistics of the graphs it runs."""
        if not torch.is_grad_enabled() and self._options["backend"] == "eager":
            return self.original(*args, **kwargs)  # nothing to capture for, nothing to compile
        mark_batch_dynamic(args, kwargs)
        recorder = self.recorder
        if recorder.keep_inputs:
            recorder.last_inputs = (args, kwargs)
        if not (recorder.armed and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        with recorder.forward_pass(batch_size((args, kwargs))) as record:
            output = self._forward(*args, **kwargs)
        return recorder.tap(output, record, self._statistics_of())

    def trace(self, *args: Any, **kwargs: Any) -> CurvaturePlan:
        """Capture the model for example inputs without training it.

        Buffers and random number generators are left as they were.

        Returns:
            The plan, also at :attr:`plan`.

        Raises:
            CaptureError: dynamo captured no graph of the model.
        """
        mark_batch_dynamic(args, kwargs)
        with _state_preserved(self.original), torch.enable_grad():
            self._forward(*args, **kwargs)
        return self.plan

    def trace_symbolic(self, *inputs: Tensor) -> CurvaturePlan:
        """Capture the model by ``symbolic_trace``, without running it, to look at the result.

        Python branches and the training flag are fixed in the graph: the model then refuses to
        run. For training, compile it anew.

        Raises:
            CaptureError: ``symbolic_trace`` cannot follow the model.
        """
        module = symbolic_graph(self.original, inputs)
        missing = sum(node.op == "placeholder" for node in module.graph.nodes) - len(inputs)
        self._handle_graph(module, [*inputs, *(None,) * missing])
        self.__dict__["_forward"] = refuse_to_run
        return self.plan

    def collect_statistics(self, *args: Any, **kwargs: Any) -> None:
        """Add the statistics of one batch, with sampled targets, to those of the next step.

        Buffers and random number generators are left as they were.
        """
        mark_batch_dynamic(args, kwargs)
        with _state_preserved(self.original), torch.enable_grad():
            with self.recorder.forward_pass(batch_size((args, kwargs)), fisher="sampled") as record:
                output = self._forward(*args, **kwargs)
            self.recorder.collect(output, record, self._statistics_of())

    # -- what the compiler did -----------------------------------------------------------

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        """Captured graphs in the order of their capture, each with its stages."""
        for graph in self._graphs:
            self._emitting(graph)
        return tuple(self._graphs)

    @property
    def plan(self) -> CurvaturePlan:
        """The account of every parameter over all graphs captured so far.

        Raises:
            CaptureError: nothing was captured yet.
        """
        if not self._graphs:
            raise CaptureError(
                "nothing is captured yet: run a forward pass with gradients enabled, or call "
                "compiled.trace(*example_inputs)"
            )
        parameters = self._parameter_specs()
        if self._plan is None or self._plan[0] != parameters:
            uses = [graph.uses for graph in self._graphs]
            choices = {name: self._options[name] for name in ("norm_layers", "weight_sharing")}
            plan = build_plan(parameters, uses, **choices)
            if self._options["strict"]:
                refuse_generic_layers(plan, uses)
            self.__dict__["_plan"] = (parameters, plan)
        return self._plan[1]

    @property
    def revision(self) -> int:
        """Number of graphs captured so far; the plan may change when it grows."""
        return len(self._graphs)

    @property
    def backend(self) -> str:
        """What runs the captured graphs."""
        return self._options["backend"]

    @property
    def forms_of(self) -> FormsOf:
        """The forms of a block's factors, None for a block that emits none; an optimizer sets
        it."""
        return self.__dict__["_forms_of"]

    @forms_of.setter
    def forms_of(self, choose: FormsOf) -> None:
        self.__dict__["_forms_of"] = choose

    def _parameter_specs(self) -> list[ParameterSpec]:
        return [
            ParameterSpec(name, tuple(p.shape), p.requires_grad)
            for name, p in self.original.named_parameters()
        ]

    def _emitters(self) -> Emitters:
        chosen = ((block, self.forms_of(block)) for block in self.plan.blocks)
        return {block.weight: (block, forms) for block, forms in chosen if forms is not None}

    def _statistics_of(self) -> dict[str, list[str]]:
        return {b.name: list(statistic_shapes(b, form)) for b, form in self._emitters().values()}

    # -- graphs --------------------------------------------------------------------------

    def _handle_graph(
        self, module: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Backend of dynamo: keep the graph, and return what runs in its place."""
        names = {id(p): name for name, p in self.original.named_parameters()}
        captured = Stage("captured", copy_graph(module))
        parameters = parameter_nodes(captured.module, example_inputs, names)
        constants = constant_nodes(captured.module)
        canonical = run_passes(captured.module, [("canonical", canonicalise)])
        graph = CapturedGraph(
            index=len(self._graphs),
            parameters=parameters,
            stages=[captured, *canonical],
            uses=match_uses(canonical[-1].module.graph, parameters, constants),
            run=compile_plain(self._options["backend"], module, example_inputs),
        )
        self._graphs.append(graph)
        self.__dict__["_plan"] = None
        return lambda *inputs: self._run_graph(graph, inputs)

    def _run_graph(self, graph: CapturedGraph, inputs: tuple[Any, ...]) -> Any:
        record = self.recorder.recording
        if record is None:
            return graph.run(*inputs)
        record.graphs += 1
        emitters = self._emitters()
        order = emission_order(graph.uses.sites, emitters)
        if not order:
            return graph.run(*inputs)
        gated = self._options["backend"] != "eager"
        probes: list[Tensor] = []
        for weight in order:
            if emitters[weight][1].output == "absent":
                continue
            parameter = self.original.get_parameter(weight)
            probes += self.recorder.probes_for(*emitters[weight], parameter, gated=gated)
        outputs, rows, *returned = self._emitting(graph)(*inputs, *probes)
        sites = [site for site in graph.uses.sites if site.weight in emitters]
        blocks = [emitters[site.weight][0] for site in sites]
        spans = [block.span(site) for block, site in zip(blocks, sites, strict=True)]
        self.recorder.note_rows(*counts_of_spans(blocks, spans, rows))
        alone = [emitters[s.weight] for s in sites if emitters[s.weight][1].output == "absent"]
        for (block, forms), values in zip(alone, *returned or [()], strict=True):
            names = statistic_shapes(block, forms)
            self.recorder.note_inputs(block, dict(zip(names, values, strict=True)))
        return outputs

    def _emitting(self, graph: CapturedGraph) -> Callable[..., Any]:
        emitters = self._emitters()
        key = tuple(emitters[w] for w in emission_order(graph.uses.sites, emitters))
        if key not in graph.emitting:
            stages = emitting_stages(graph.stage("canonical"), graph.uses.sites, emitters)
            graph.stages[2:] = stages
            graph.emitting[key] = compile_emitting(self._options["backend"], stages[-1].module)
        return graph.emitting[key]

    # -- behave as the original ------------------------------------------------------------

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The original's training flag."""
        return self.original.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.original.training = mode

    def train(self, mode: bool = True) -> CompiledModel:
        """Set the original's mode, through its own ``train``."""
        self.original.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's, key for key."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's."""
        return self.original.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.original._load_from_state_dict(*args, **kwargs)

    def apply(self, fn: Callable[[nn.Module], None]) -> CompiledModel:
        """Apply ``fn`` to the original and all its submodules."""
        self.original.apply(fn)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        self.original._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("training", "forms_of") or "_forward" not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.original, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        copied = CompiledModel(copy.deepcopy(self.original, memo), **self._options)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.original, self._options)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        state = "not captured yet"
        if self._graphs:
            state = f"{len(self._graphs)} graphs, {len(self.plan.blocks)} blocks"
        return f"CompiledModel({type(self.original).__name__}: {state}; {options})"

    def _repr_html_(self) -> str:
        """The short summary, and the plan once there is one, for notebooks."""
        summary = f"<p><code>{escape(repr(self))}</code></p>"
        return summary + (self.plan._repr_html_() if self._graphs else "")


def _rebuild(model: nn.Module, options: dict[str, Any]) -> CompiledModel:
    return CompiledModel(model, **options)


@contextmanager
def _state_preserved(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random number generators afterwards."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
