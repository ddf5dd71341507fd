"""Capture by a ``torch.compile`` backend: sees any Python, guards it, survives graph breaks."""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from kfc_fx.capture.recomputation import run_by_op
from kfc_fx.errors import OptionError

BACKENDS = ("eager", "aot_eager", "inductor")

GraphHandler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Receives a captured graph and its example inputs, returns what is to run in its place."""

_serial = itertools.count()


def compile_forward(model: nn.Module, handle_graph: GraphHandler) -> Callable[..., Any]:
    """A function that calls ``model`` through dynamo, each captured graph given to the handler.

    The function has a code object of its own. Dynamo keeps its graphs and its recompile limit
    per code object, so several compiled models of one class do not use up each other's.
    """

    def call_model(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call_model.__code__.replace(co_name=f"call_model_{next(_serial)}")
    own = types.FunctionType(
        code, call_model.__globals__, code.co_name, None, call_model.__closure__
    )
    compiled = torch.compile(own, backend=handle_graph)

    def call(*args: Any, **kwargs: Any) -> Any:
        # Dynamo would skip the whole frame around a fused LSTM or GRU; as one op of the graph it
        # leaves the layers around it to be seen. And it would draw numpy's random numbers from
        # torch's generator, so that the model would see others than uncompiled.
        with torch._dynamo.config.patch(allow_rnn=True, use_numpy_random_stream=True):
            return compiled(*args, **kwargs)

    return call


def compile_plain(
    backend: str, module: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """The graph as ``backend`` compiles it, inside dynamo's compilation of the frame."""
    if backend == "eager":
        return run_by_op(module)
    return torch._dynamo.lookup_backend(backend)(module, list(example_inputs))


def compile_emitting(backend: str, module: fx.GraphModule) -> Callable[..., Any]:
    """The emitting graph for ``backend``, compiled at its first call."""
    if backend == "eager":
        return run_by_op(module)
    compiled = torch.compile(module, backend=backend, fullgraph=True)

    def run(*inputs: Any) -> Any:
        # The Fisher pass retains the graph for the loss's backward pass, so the compiled
        # backward must not reuse ("donate") the buffers that the forward saved.
        with torch._functorch.config.patch(donated_buffer=False), warnings.catch_warnings():
            # Dynamo reads .grad of every input, gated probes among them, which are no leaves.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", UserWarning)
            return compiled(*inputs)

    return run


def check_backend(backend: str) -> None:
    """Raise :class:`OptionError` unless the backend is one that is supported."""
    if backend not in BACKENDS:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def mark_batch_dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell dynamo that the first dimension of every input may change, without insisting.

    Without it, the second batch size met (the last batch of an epoch) costs a recompile.
    """
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(leaf, 0)


def constant_nodes(module: fx.GraphModule) -> set[str]:
    """Placeholders that hold an attribute of the model, such as a buffer, and not an input."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    sources = {n.name: n.meta["grapharg"].source for n in placeholders if "grapharg" in n.meta}
    return {name for name, source in sources.items() if _spelled(source).startswith("L['model']")}


def _spelled(source: Any) -> str:
    """A property since torch 2.12, a method before."""
    return source.name() if callable(source.name) else source.name


def parameter_nodes(
    module: fx.GraphModule, example_inputs: Sequence[Any], names: dict[int, str]
) -> dict[str, str]:
    """Node name to parameter name, by the identity of the tensors behind placeholders.

    Args:
        names: ``id(parameter)`` to name.
    """
    found = {}
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=True):
        if id(value) in names:
            found[node.name] = names[id(value)]
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = module
            for part in node.target.split("."):
                value = getattr(value, part)
            if id(value) in names:
                found[node.name] = names[id(value)]
                node.meta.setdefault("example_value", value)
    return found
