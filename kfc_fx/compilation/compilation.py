"""What the compiler knows of one model: its graphs, their bindings, the plan, what emits."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from kfc_fx.capture.entries import INSTALLED, EntryCalls
from kfc_fx.capture.graph_breaks import GraphBreak
from kfc_fx.capture.parameter_names import ParameterNames
from kfc_fx.capture.preserved_state import state_preserved
from kfc_fx.capture.regions import is_run_again
from kfc_fx.capture.replicas import refuse_replicas
from kfc_fx.capture.symbolic import symbolic_graph
from kfc_fx.capture.transforms import is_transformed
from kfc_fx.capture.wrappers import refuse_join, reshard
from kfc_fx.compilation.armed_pass import ArmedPass
from kfc_fx.compilation.captured_graph import BoundGraph, CapturedGraph
from kfc_fx.compilation.loss_functions import likelihood_of_graphs
from kfc_fx.compilation.options import CompileOptions
from kfc_fx.compilation.owners import Owners
from kfc_fx.compilation.progress import told_of_capture
from kfc_fx.compilation.reasons import FOREIGN, why_not_called, why_nothing_ran
from kfc_fx.compilation.runs import Runs
from kfc_fx.errors import CaptureError, OptionError, counted
from kfc_fx.plan.forms import FactorForms, factor_forms
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan
from kfc_fx.rewrite.emitting import Emitters
from kfc_fx.statistics.collector import Collector
from kfc_fx.statistics.fisher_pass import REENTRANT
from kfc_fx.statistics.inputs import batch_size
from kfc_fx.statistics.likelihoods.bernoulli import Bernoulli
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.choice import LikelihoodChoice
from kfc_fx.statistics.likelihoods.gaussian import Gaussian
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.request import StatisticsRequest
from kfc_fx.statistics.tap import collect, tap

_INSTALLED_ONES: weakref.WeakSet[Compilation] = weakref.WeakSet()
_SERIAL = itertools.count()


class Compilation:
    """What the compiler knows of a model: ``model.kfc``.

    It captures the model and runs it, on an armed step with statistics of the graphs that it runs.
    The model's own call, hooks and all, is what is captured; only what ``nn.Module`` calls in its
    place is set on the model.

    Args:
        model: whose calls it takes once it is installed.
    """

    def __init__(self, model: nn.Module, options: CompileOptions) -> None:
        self.model = model
        self.options = options
        self.serial: int = next(_SERIAL)
        """Larger for compilations that were made later."""
        self._before: Callable[..., Any] | None = None
        self.names: ParameterNames = ParameterNames(model)
        self.choice: LikelihoodChoice = LikelihoodChoice(
            options.likelihood,
            lambda: likelihood_of_graphs(self._account.graphs),
            batch_dim=options.batch_dim,
        )
        """The likelihood of the model's output."""
        self._plan: tuple[CurvaturePlan, CurvaturePlan] | None = None
        """That of the account, and the same with the likelihood."""
        self._owners = Owners()
        self._runs = Runs(model, options, self.names, self._owners.owner_of)
        self._account = self._runs.account
        self._entries = EntryCalls(model, self._enter, self._runs.inside)
        self._tracing = False
        self._told = False
        """Whether a call has said that it captures, where that took long."""

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
        return self._runs.runs

    @property
    def known_to_model(self) -> bool:
        """Whether the model is still compiled by this compilation."""
        return vars(self.model).get("kfc") is self

    @property
    def why_not_called(self) -> str:
        """What to do where no call of the model has come here, in one sentence."""
        return why_not_called(installed=self.installed)

    def install(self) -> None:
        """Let the model's calls come here; what was called before is put aside."""
        own = vars(self.model)
        self._before = own.get(INSTALLED)
        own[INSTALLED] = own["kfc"] = self
        _INSTALLED_ONES.add(self)

    def remove(self) -> None:
        """Leave the model as it was."""
        self._entries.remove()
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
        return restored(model, self.options.as_given(), self.choice.state())

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self.model, self.options.as_given(), self.choice.state())

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
        collector = Collector(self.choice, request, self.options.output_batch_dim)
        self._owners.assign(collector, parameters)
        self.take_entries()
        return collector

    def assign(self, collector: Collector, parameters: Iterable[str]) -> None:
        """Give a collector the blocks of more parameters, by name."""
        self._owners.assign(collector, parameters)

    def take_entries(self) -> None:
        """Let outermost calls of the modules that the model has now come here too."""
        if self.runs:
            self._entries.refresh()
            self._runs.keep_entries(self._entries.modules)

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
        refuse_replicas(self.model)
        if not torch.is_grad_enabled() and self.options.backend == "eager":
            # There is nothing to capture for, and nothing to compile.
            return self.model._call_impl(*args, **kwargs)
        if is_transformed(args, kwargs):
            return self.model._call_impl(*args, **kwargs)
        for collector in () if self._tracing else self.collectors:
            collector.note_inputs((args, kwargs))
        return self._called(args, kwargs, None)

    def _enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The outermost call of a module of the model, which is an entry as the model's own is."""
        wanted = self.collectors or self._tracing
        if is_transformed(args, kwargs) or is_run_again() or not wanted:
            return module._call_impl(*args, **kwargs)
        return self._called(args, kwargs, (path, module))

    def _called(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: tuple[str, nn.Module] | None
    ) -> Any:
        if self._told or not (self._tracing or torch.is_grad_enabled()):
            return self._run(args, kwargs, entry)
        self._told = True
        with told_of_capture(type(self.model).__name__, self._outcome):
            return self._run(args, kwargs, entry)

    def _outcome(self) -> str:
        """What was captured so far, in a few words."""
        graphs, blocks = len(self._account.graphs), len(self._blocks)
        if not graphs:
            return ""
        return f"{counted(graphs, 'graph')}, {counted(blocks, 'block')}"

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: tuple[str, nn.Module] | None
    ) -> Any:
        if self._tracing:
            return self._runs.call(args, kwargs, recording=True, entry=entry)
        armed = [collector for collector in self.collectors if collector.armed]
        if entry is not None and torch._C._current_graph_task_id() >= 0:
            # Of a checkpoint that is reentrant: what its output goes into was differentiated.
            for collector in armed:
                if not collector.taking:
                    collector.note_missing(REENTRANT)
            armed = [collector for collector in armed if collector.taking]
        if not (armed and torch.is_grad_enabled()):
            return self._runs.call(args, kwargs, recording=False, entry=entry)
        refuse_join()
        self.names.refresh_if_trained({p for c in self.collectors for p in c.trained()})
        examples = batch_size((args, kwargs), self.options.input_batch_dim)
        running = ArmedPass({collector: collector.begin(examples) for collector in armed})
        with self._runs.recording(running):
            output = self._runs.call(args, kwargs, recording=True, entry=entry)
        return self._tapped(output, running, None if entry is None else entry[0])

    def trace(self, *args: Any, **kwargs: Any) -> CurvaturePlan:
        """Capture the model for example inputs and build its emitting graphs; buffers and random
        numbers stay as they were.

        Raises:
            CaptureError: dynamo captured no graph of the model.
        """
        return self.trace_calls(self, *args, **kwargs)

    def trace_calls(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> CurvaturePlan:
        """The same for a model that is used by another function than its ``forward``: each call of
        the model, and each outermost call of a module of it, that the function makes is captured.

        Args:
            function: called with the other arguments; a method of the model for one.

        Raises:
            CaptureError: dynamo captured no graph in it.
        """
        self.names.refresh()
        self.take_entries()
        self._tracing = True
        try:
            with state_preserved(self.model), torch.enable_grad():
                function(*args, **kwargs)
        finally:
            self._tracing = False
            if not self.collectors:
                self._entries.remove()  # nobody trains it yet
            reshard(self.model)
        self.emitting_graphs()
        return self.plan

    def trace_symbolic(self, *inputs: Tensor) -> CurvaturePlan:
        """Capture the model by ``symbolic_trace``; it then refuses to run."""
        self._entries.remove()
        module = symbolic_graph(self.model, inputs)
        missing = sum(node.op == "placeholder" for node in module.graph.nodes) - len(inputs)
        self._runs.keep_symbolic(module, [*inputs, *(None,) * missing])
        self.emitting_graphs()
        return self.plan

    def collect_statistics(self, collector: Collector, *args: Any, **kwargs: Any) -> None:
        """Add the statistics of one batch, with sampled targets, to the sums of a collector.

        Buffers and random number generators are left as they were.
        """
        record = collector.begin(
            batch_size((args, kwargs), self.options.input_batch_dim), fisher="sampled"
        )
        running = ArmedPass({collector: record})
        with state_preserved(self.model), torch.enable_grad():
            with self._runs.recording(running):
                output = self._runs.call(args, kwargs, recording=True)
            running.drop_changed(self._blocks)
            collect(output, collector.setup(record))

    def _tapped(self, output: Any, running: ArmedPass, entry: str | None = None) -> Any:
        """The output of an armed pass, through which its statistics are taken.

        Args:
            entry: path of the module that was called, where it was not the model.
        """
        running.drop_changed(self._blocks)
        in_function = self._runs.layers.watch.in_function
        for collector, record in running.records.items():
            if in_function:
                record.again = partial(self._runs.again, running)
            elif running.graphs == 0:
                record.missing = self._why_nothing_ran()
            elif self._blocks and entry is None and not running.has_emitted:
                record.missing = FOREIGN
            if record.missing:
                collector.note_missing(record.missing, alone=record.missing == FOREIGN)
        setups = [c.setup(record) for c, record in running.records.items() if not record.missing]
        return tap(output, setups, entry) if setups else output

    @property
    def _missing(self) -> str:
        """Why the last armed forward pass gave no statistics, where that is known."""
        return next((c.missing for c in self.collectors if c.missing), "")

    def _why_nothing_ran(self) -> str:
        """The reasons for which the forward pass ran outside of all graphs."""
        return self._missing or why_nothing_ran(self._runs.breaks.breaks)

    # -- what the compiler did ---------------------------------------------------------------

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        """Captured graphs in the order of their capture, each with the stages that there are."""
        return tuple(self._account.graphs)

    def emitting_graphs(self) -> tuple[BoundGraph, ...]:
        """Every captured graph under each of its bindings, with the stages of the emitting graph
        for what is asked now. An emitting graph that there is not yet is built, and not run."""
        return self._runs.emitting_graphs(self._all_emitters())

    @property
    def breaks(self) -> tuple[GraphBreak, ...]:
        """Where Python runs between the graphs, and dynamo's reasons for it."""
        return self._runs.breaks.breaks

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
        own, lines = self._account.plan, tuple(self.choice.lines)
        if self._plan is None or self._plan[0] is not own or self._plan[1].likelihood != lines:
            self._plan = (own, replace(own, likelihood=lines))
        return self._plan[1]

    @property
    def likelihood(self) -> Likelihood | None:
        """That of the model's output, named or found from the loss; None until it is known."""
        return self.choice.likelihood

    @property
    def _blocks(self) -> tuple[BlockSpec, ...]:
        return self._account.plan.blocks if self.captured else ()

    def _why_nothing_captured(self) -> str:
        if self._runs.called:
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


def restored(
    model: nn.Module, options: dict[str, Any], likelihood: dict[str, Any] | None = None
) -> Compilation:
    """A compilation anew on a copied or unpickled model, which may still be without its state.

    Args:
        options: as :meth:`CompileOptions.as_given` has them.
        likelihood: as :meth:`LikelihoodChoice.state` has it.
    """
    compilation = Compilation(model, CompileOptions.of(**options))
    compilation.choice.restore(likelihood or {})
    compilation.install()
    return compilation


# A whole model is then loaded with weights_only=True if its own classes are known as safe.
torch.serialization.add_safe_globals([restored, Categorical, Bernoulli, Gaussian])
