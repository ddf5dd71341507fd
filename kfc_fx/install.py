"""``kfc_fx.compile``, and the compiled model that stands in for the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from html import escape
from typing import Any

from torch import Tensor, nn

from kfc_fx.capture.dynamo import check_backend
from kfc_fx.capture.graph_breaks import GraphBreak
from kfc_fx.compilation import Compilation, CompileOptions
from kfc_fx.compilation.captured_graph import CapturedGraph
from kfc_fx.plan.sharing import SharingOption, check_sharing
from kfc_fx.plan.spec import CurvaturePlan
from kfc_fx.statistics.likelihood import CotangentFunction, Likelihood, resolve_likelihood


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
    return CompiledModel(
        model, CompileOptions(resolved, backend, strict, norm_layers, weight_sharing)
    )


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

    def __init__(self, model: nn.Module, options: CompileOptions) -> None:
        own = self.__dict__
        own["original"] = model
        training = model.training
        super().__init__()
        model.training = training  # nn.Module's constructor sets the flag, which is the original's
        for name in _SHARED:
            own[name] = getattr(model, name)
        own["_compilation"] = Compilation(model, options)

    # -- the model's calls ---------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; on an armed step with statistics of the graphs it runs."""
        return self._compilation(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> CurvaturePlan:
        """Capture the model for example inputs without training it.

        Buffers and random number generators are left as they were.

        Returns:
            The plan, also at :attr:`plan`.

        Raises:
            CaptureError: dynamo captured no graph of the model.
        """
        return self._compilation.trace(*args, **kwargs)

    def trace_symbolic(self, *inputs: Tensor) -> CurvaturePlan:
        """Capture the model by ``symbolic_trace``, without running it, to look at the result.

        Python branches and the training flag are fixed in the graph: the model then refuses to
        run. For training, compile it anew.

        Raises:
            CaptureError: ``symbolic_trace`` cannot follow the model.
        """
        return self._compilation.trace_symbolic(*inputs)

    # -- what the compiler did -----------------------------------------------------------

    @property
    def kfc(self) -> Compilation:
        """What the compiler knows of the model."""
        return self._compilation

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        """Captured graphs in the order of their capture, each with its stages."""
        return self._compilation.graphs

    @property
    def breaks(self) -> tuple[GraphBreak, ...]:
        """Where Python runs between the graphs, and dynamo's reasons for it."""
        return self._compilation.breaks

    @property
    def plan(self) -> CurvaturePlan:
        """The account of every parameter over all graphs captured so far.

        Raises:
            CaptureError: nothing was captured yet.
        """
        return self._compilation.plan

    @property
    def revision(self) -> int:
        """Grows with all that is captured; the plan may change when it does."""
        return self._compilation.revision

    @property
    def backend(self) -> str:
        """What runs the captured graphs."""
        return self._compilation.options.backend

    def refresh_names(self) -> None:
        """Take the parameters that the model holds now for its own, as an optimizer is made."""
        self._compilation.names.refresh_if_changed()

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
        if name == "training" or "_compilation" not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.original, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        copied = CompiledModel(copy.deepcopy(self.original, memo), self._compilation.options)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledModel, (self.original, self._compilation.options)

    def __repr__(self) -> str:
        given = self._compilation.options
        options = ", ".join(f"{f.name}={getattr(given, f.name)!r}" for f in fields(given))
        state = "not captured yet"
        if self._compilation.captured:
            state = f"{len(self.graphs)} graphs, {len(self.plan.blocks)} blocks"
        return f"CompiledModel({type(self.original).__name__}: {state}; {options})"

    def _repr_html_(self) -> str:
        """The short summary, and the plan once there is one, for notebooks."""
        summary = f"<p><code>{escape(repr(self))}</code></p>"
        return summary + (self.plan._repr_html_() if self._compilation.captured else "")
