"""Layers that run outside of any graph, each captured for itself.

Dynamo skips a frame whose loop has a break in it, or that it has compiled too often, and runs
nothing of what ``torch.nn`` does for such a frame. A module that holds parameters is therefore
watched while the model runs: where plain Python calls it, its forward pass goes through a capture
of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules import module as module_globals

from kfc_fx.capture.dynamo import mark_batch_dynamic
from kfc_fx.capture.entries import INSTALLED, is_entry_call
from kfc_fx.capture.graph_breaks import Frame
from kfc_fx.capture.regions import is_run_again

NOT_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
"""Folders whose frames stand between a module and the program that calls it."""


CaptureForward = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class Watch:
    """What the watched modules of one model ask at each of their calls."""

    recording: bool = False
    """Whether the pass that runs takes statistics, or accounts for the uses of parameters."""
    in_function: bool = False
    """Whether an ``autograd.Function`` has called a layer in it."""
    layer: str = ""
    """Path of the layer whose capture runs; empty else."""
    passed_by: bool = False
    """Whether a layer that has a capture ran without it."""


class LayerCaptures:
    """Watches the modules of a model that hold parameters.

    Args:
        model: whose modules are watched, itself excepted.
        capture: from a module's forward method to a function that runs it captured.
    """

    def __init__(self, model: nn.Module, capture: CaptureForward) -> None:
        self.watch: Watch = Watch()
        self._model = model
        self._capture = capture
        self._layers: dict[nn.Module, LayerCapture] = {}
        self._installed = False

    def refresh(self) -> None:
        """Watch the modules that the model has now."""
        found: dict[nn.Module, LayerCapture] = {}
        for path, module in self._model.named_modules():
            if module is self._model or not any(p is not None for p in module._parameters.values()):
                continue
            known = self._layers.get(module)
            if known is None or known.path != path:
                known = LayerCapture(path, module, self._capture, self.watch)
            found[module] = known
        self._layers = found

    def capture_anew(self) -> None:
        """Let each layer have a new capture at its next call."""
        for layer in self._layers.values():
            layer.capture_anew()

    @property
    def alone(self) -> Mapping[str, Frame]:
        """Path of each layer that has run outside of any graph, to the frame that called it."""
        return {
            layer.path: layer.called_from
            for layer in self._layers.values()
            if layer.called_from is not None
        }

    @contextmanager
    def installed(self, *, recording: bool, within: str = "") -> Iterator[None]:
        """While it lasts, calls from plain Python are captured.

        Args:
            within: path of the module that is called; empty for the model.
            recording: run the captures at every such call; else those of layers of ``torch.nn``
                at the first one alone, since dynamo runs nothing of theirs.
        """
        if recording or not self._layers:
            self.refresh()
        outer, self.watch.recording = self.watch.recording, recording
        self.watch.in_function = self.watch.passed_by = False
        if self._installed:  # a call of the model within a call of the model
            try:
                yield
            finally:
                self.watch.recording = outer
            return
        layers = list(self._layers.values())
        if within:
            below = f"{within}."
            layers = [layer for layer in layers if layer.path.startswith(below)]
        self._installed = True
        try:
            for layer in layers:
                layer.install()
            yield
        finally:
            for layer in layers:
                layer.remove()
            self.watch.recording, self._installed = outer, False


class LayerCapture:
    """The capture of one module's forward pass."""

    def __init__(self, path: str, module: nn.Module, capture: CaptureForward, watch: Watch) -> None:
        self.path = path
        self.module = module
        self.watch = watch
        self.called_from: Frame | None = None
        """The frame of plain Python that called the module first."""
        self.own_call: Callable[..., Any] | None = None
        """What the user has put in place of the module's call, by ``module.compile()``."""
        self._before: Callable[..., Any] | None = None
        self._capture = capture
        self._forward: Callable[..., Any] | None = None
        self._captured: object = None
        self.call: Callable[..., Any] = _watched_call(self)

    def install(self) -> None:
        """Let plain Python that calls the module come here."""
        self._before = self.module.__dict__.get(INSTALLED)
        self.own_call = None if is_entry_call(self._before) else self._before
        self.module.__dict__[INSTALLED] = self.call

    def remove(self) -> None:
        """Leave the module as it was, also where nothing is installed."""
        if self._before is not None:
            self.module.__dict__[INSTALLED] = self._before
        elif self.module.__dict__.get(INSTALLED) is self.call:
            del self.module.__dict__[INSTALLED]

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module, its hooks as they are, its forward pass through the capture."""
        if is_run_again():
            return self.module._call_impl(*args, **kwargs)
        if self.called_from is None:
            self.called_from = _calling_frame(sys._getframe(1))
        forward = self._own_forward()
        mark_batch_dynamic(args, kwargs)
        outer, self.watch.layer = self.watch.layer, self.path
        try:
            if not _has_hooks(self.module):
                return forward(*args, **kwargs)
            with _in_place_of_forward(self.module, forward):
                return self.module._call_impl(*args, **kwargs)
        finally:
            self.watch.layer = outer

    def capture_anew(self) -> None:
        """Make a new capture at the next call, as if there had been none."""
        self._forward = self.called_from = None

    def _own_forward(self) -> Callable[..., Any]:
        own = self.module.__dict__.get("forward", type(self.module).forward)
        if self._forward is None or self._captured is not own:
            self._captured = own
            self._forward = self._capture(self.module.forward)
        return self._forward


def _watched_call(layer: LayerCapture) -> Callable[..., Any]:
    """What stands in for the module's ``_call_impl``.

    Dynamo may trace through it, and then sees the call as it would be without. Where dynamo runs
    frames of plain Python, it is to leave this one alone, and go on in what it calls.
    """
    module, watch = layer.module, layer.watch
    of_torch = type(module).__module__.startswith("torch.nn.")

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return module._call_impl(*args, **kwargs)
        if not torch.is_grad_enabled():
            if watch.recording and not watch.in_function:
                watch.in_function = _within_autograd_function()
        elif watch.recording or not of_torch or layer.called_from is None:
            return layer.run(args, kwargs)
        else:
            watch.passed_by = True
        if layer.own_call is not None:
            return layer.own_call(*args, **kwargs)
        return module._call_impl(*args, **kwargs)

    torch._dynamo.eval_frame.skip_code(call.__code__)
    return call


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def _within_autograd_function() -> bool:
    """Whether the forward pass of an ``autograd.Function`` runs, as of a reentrant checkpoint. What
    it does without gradients it may do again in its backward pass, with them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and any(
            isinstance(value, FunctionCtx) for value in frame.f_locals.values()
        ):
            return True
        frame = frame.f_back
    return False


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )


@contextmanager
def _in_place_of_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _calling_frame(frame: FrameType | None) -> Frame:
    """The innermost frame of the user's, from one of this module's outwards."""
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(NOT_USERS):
            return (code.co_filename, code.co_name, code.co_firstlineno)
        frame = frame.f_back
    return ("?", "?", 0)
