"""Capture by a ``torch.compile`` backend: sees any Python, guards it, survives graph breaks."""

from __future__ import annotations

import itertools
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from kfc_fx.capture.checkpoints import run_by_op
from kfc_fx.capture.messages import messages_captured
from kfc_fx.capture.sparse_tensors import sparse_tensors_captured
from kfc_fx.errors import OptionError, first_line, warn

BACKENDS = ("eager", "aot_eager", "inductor")

GraphHandler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Receives a captured graph and its example inputs, returns what is to run in its place."""

_serial = itertools.count()
RECOMPILES, ALL_RECOMPILES = (
    torch._dynamo.config.recompile_limit,
    torch._dynamo.config.accumulated_recompile_limit,
)
"""How often dynamo compiles a frame, at a time and in all: its own limits, meant for one model."""


def compile_forward(model: Callable[..., Any], handle_graph: GraphHandler) -> Callable[..., Any]:
    """A function that calls ``model`` through dynamo, each captured graph given to the handler.

    The function has a code object of its own. Dynamo keeps its graphs and its recompile limit
    per code object, so several compiled models of one class do not use up each other's. It is to
    be called within :func:`dynamo_settings`.

    Args:
        model: a module, or the forward method of one.
    """

    def call_model(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call_model.__code__.replace(co_name=f"call_model_{next(_serial)}")
    own = types.FunctionType(
        code, call_model.__globals__, code.co_name, None, call_model.__closure__
    )
    _forwards.add(own)
    return torch.compile(own, backend=handle_graph)


_forwards: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
"""Those of all compiled models that there are, and of their entries."""


def forget_frames(traceback: TracebackType | None) -> None:
    """Let dynamo try the frames of a traceback anew, those that it has given up among them: of
    user code, and of modules of torch. Frames of this folder stay as they are: some of them dynamo
    is never to see."""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        of_torch = code.co_filename.startswith(TORCH) and not code.co_filename.startswith(MODULES)
        if not (of_torch or code.co_filename.startswith(OWN)):
            torch._C._dynamo.eval_frame.reset_code(code)
        traceback = traceback.tb_next


TORCH = str(Path(torch.__file__).parent)
MODULES = str(Path(TORCH) / "nn" / "modules")
OWN = str(Path(__file__).parent)


@contextmanager
def dynamo_settings(backend: str) -> Iterator[None]:
    """Settings under which models are captured, of any number of frames, for a backend."""
    with ExitStack() as stack:
        stack.enter_context(_config())
        for permission in (sparse_tensors_captured, messages_captured):
            stack.enter_context(permission.given(backend == "eager"))
        yield


def _config() -> AbstractContextManager[None]:
    config, models = torch._dynamo.config, len(_forwards)
    total = config.accumulated_recompile_limit
    return config.patch(
        # Limits of a frame: behind a graph break it is that of all models of its class.
        recompile_limit=max(config.recompile_limit, RECOMPILES * models),
        accumulated_recompile_limit=max(total, ALL_RECOMPILES * models),
        # Dynamo would skip the whole frame around a fused LSTM or GRU; as one op of the graph it
        # leaves the layers around it to be seen.
        allow_rnn=True,
        # Dynamo would draw numpy's random numbers from torch's generator, so that the model would
        # see others than uncompiled.
        use_numpy_random_stream=True,
        # A frame that dynamo fails on runs as plain Python, where errors of the user's are torch's
        # own; those of the handler are kept by it.
        suppress_errors=True,
        # A counter on a module would cost a graph at every step.
        allow_unspec_int_on_nn_module=True,
        # Hooks that come or go after the capture would be left out, or run on.
        skip_nnmodule_hook_guards=False,
        # DDP would have graphs split and their parameters replaced by fake tensors.
        optimize_ddp=False,
    )


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
    return _CompiledOnce(module, backend)


class _CompiledOnce:
    """A graph that is compiled at its first call; op by op, if it cannot be."""

    def __init__(self, module: fx.GraphModule, backend: str) -> None:
        self._module, self._backend = module, backend
        self._run = torch.compile(module, backend=backend, fullgraph=True)

    def __call__(self, *inputs: Any) -> Any:
        # The Fisher pass retains the graph for the loss's backward pass, so the compiled
        # backward must not reuse ("donate") the buffers that the forward saved.
        with torch._functorch.config.patch(donated_buffer=False), warnings.catch_warnings():
            # Dynamo reads .grad of every input, gated probes among them, which are no leaves.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", UserWarning)
            try:
                return self._run(*inputs)
            except torch._dynamo.exc.Unsupported as error:
                reason = first_line(error)
        warn(
            f"a graph with statistics is run op by op, since {self._backend!r} cannot compile it: "
            f"{reason}"
        )
        self._run = run_by_op(self._module)
        return self._run(*inputs)


def check_backend(backend: str) -> None:
    """Raise :class:`OptionError` unless the backend is one that is supported."""
    if backend not in BACKENDS:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def mark_batch_dynamic(args: tuple[Any, ...], kwargs: dict[str, Any], batch_dim: int = 0) -> None:
    """Tell dynamo that the dimension of the examples may change, and the first, without insisting.

    Without it, the second batch size met (the last batch of an epoch) costs a recompile. Sparse
    tensors are left out: products with one of unknown size are none that dynamo knows.
    """
    for leaf in pytree.tree_leaves((args, kwargs)):
        if not isinstance(leaf, torch.Tensor) or leaf.layout is torch.sparse_coo:
            continue
        for dim in {0, batch_dim}:
            if leaf.dim() > dim and leaf.size(dim) > 1:
                torch._dynamo.maybe_mark_dynamic(leaf, dim)


def constant_nodes(module: fx.GraphModule) -> set[str]:
    """Placeholders that hold an attribute of a module, such as a buffer, and not an input."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    sources = {n.name: n.meta["grapharg"].source for n in placeholders if "grapharg" in n.meta}
    return {name for name, source in sources.items() if _is_of_a_module(source)}


def _is_of_a_module(source: Any) -> bool:
    """A property since torch 2.12, a method before."""
    kind = source.guard_source
    kind = kind() if callable(kind) else kind
    return kind.is_specialized_nn_module() or kind.is_unspecialized_nn_module()


def tensors_of_nodes(
    module: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the nodes hold that may be parameters, by node name: the values of placeholders, which
    differ from run to run, and the attributes of the module, which do not."""
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    given = dict(zip(placeholders, example_inputs, strict=True))
    held = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value: Any = module
            for part in node.target.split("."):
                value = getattr(value, part)
            held[node.name] = value
            if isinstance(value, torch.nn.Parameter):
                node.meta.setdefault("example_value", value)
    return given, held
