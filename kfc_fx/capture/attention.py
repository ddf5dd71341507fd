"""Open ``F.multi_head_attention_forward``, which dynamo keeps whole, so that its projections show.

The call is traced into the aten ops that it runs, before autograd, and those take its place. They
are the very ops of the uncompiled call: results and random numbers stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.nn import functional as F

PROJECTIONS = 3
"""Query, key and value share ``in_proj_weight``, a third of its rows each."""


def expand_attention(module: fx.GraphModule) -> bool:
    """Replace every call of ``F.multi_head_attention_forward`` by its ops; idempotent.

    Returns:
        Whether anything changed.
    """
    calls = [n for n in module.graph.nodes if n.target is F.multi_head_attention_forward]
    traces: dict[object, fx.GraphModule] = {}
    for node in calls:
        tensors = list(dict.fromkeys(node.all_input_nodes))
        kind = _kind(node, tensors)
        if kind not in traces:
            traces[kind] = _traced(node, tensors)
        _expand(node, tensors, traces[kind])
    return bool(calls)


def _kind(node: fx.Node, tensors: list[fx.Node]) -> object:
    """What two calls have in common whose ops are the same: arguments, and the layout of tensors.
    Layers of one kind follow each other in a transformer, and tracing one is dear."""
    places = {used: f"tensor {n}" for n, used in enumerate(tensors)}
    arguments = repr(map_arg((node.args, node.kwargs), places.__getitem__))
    return arguments, *(_layout(used.meta["example_value"]) for used in tensors)


def _layout(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return repr(value)  # a number that may change
    sizes = repr(value.shape), repr(value.stride())
    return value.dtype, value.device, value.requires_grad, value.is_leaf, *sizes


def _traced(node: fx.Node, tensors: list[fx.Node]) -> fx.GraphModule:
    """The ops of a call, whose inputs are the tensors."""
    values = [used.meta["example_value"] for used in tensors]
    # "symbolic" takes up the fake mode of the examples: tensors that the call makes are fake too.
    call = _call_on(node, tensors)
    return make_fx(call, tracing_mode="symbolic", pre_dispatch=True)(*values)


def _expand(node: fx.Node, tensors: list[fx.Node], traced: fx.GraphModule) -> None:
    packed = _packed_weight(node)
    copies: dict[fx.Node, Any] = {}
    inputs = iter(tensors)
    with node.graph.inserting_before(node):
        for traced_node in traced.graph.nodes:
            if traced_node.op == "placeholder":
                copies[traced_node] = next(inputs)
            elif traced_node.op == "output":
                results = map_arg(traced_node.args[0], copies.__getitem__)
            else:
                copies[traced_node] = _copied(node, traced_node, copies, packed)
        result = node.graph.call_function(tuple, (list(results),))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _call_on(node: fx.Node, tensors: list[fx.Node]) -> Any:
    def call(*values: torch.Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        args: Any = map_arg(node.args, given.__getitem__)
        kwargs: Any = map_arg(node.kwargs, given.__getitem__)
        return F.multi_head_attention_forward(*args, **kwargs)

    return call


def _copied(
    node: fx.Node, traced: fx.Node, copies: dict[fx.Node, Any], packed: fx.Node | None
) -> fx.Node:
    copy = node.graph.node_copy(traced, copies.__getitem__)
    copy.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    if "val" in traced.meta:
        copy.meta["example_value"] = traced.meta["val"]  # which never requires gradients
        copy.meta["kfc_call"] = node.meta.get("example_value")
    if traced.target is torch.ops.aten.linear.default and packed is not None:
        copy.meta["kfc_packed"] = (packed.name, PROJECTIONS)
    return copy


def _packed_weight(node: fx.Node) -> fx.Node | None:
    weight = node.args[5] if len(node.args) > 5 else node.kwargs.get("in_proj_weight")
    return weight if isinstance(weight, fx.Node) else None
