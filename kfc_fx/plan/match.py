"""Find the uses of parameters in a canonical graph: sites of blocks, and everything else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import fx
from torch.fx.node import map_arg

from kfc_fx.capture.nodes import dimensions, module_of, shape_of
from kfc_fx.capture.regions import REGION, Region, regions
from kfc_fx.plan.batched_calls import batched_calls, entry_of
from kfc_fx.plan.layer_calls import LayerCall, layer_call
from kfc_fx.plan.locations import locations_of
from kfc_fx.plan.spec import GraphUses, SiteSpec, UnmatchedUse
from kfc_fx.plan.weight_views import WeightView, is_view, weight_view

NO_EXAMPLES = "its input does not depend on the examples"
TRANSFORMED = "inside a function transform (vmap, grad, jvp), which hides its layers"
NESTED = "its input is a nested tensor, of which linear layers and embeddings have factors"
SPARSE_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
SPARSE = "its input is a sparse tensor"
HIDING = {
    REGION: "inside an activation checkpoint within another, which hides its layers",
    "cond": "inside a conditional region, which hides its layers",
    "while_loop": "inside a loop region, which hides its layers",
}
OTHER_CALLS = {
    **dict.fromkeys(
        ("lstm", "gru", "rnn_tanh", "rnn_relu"),
        "a fused recurrent layer, whose products are not layers of the graph",
    ),
    **dict.fromkeys(
        ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        "a fused recurrent cell, whose products are not layers of the graph",
    ),
    "bilinear": "a product of two inputs, which is no linear layer",
}
"""Why a call that reads parameters is no layer, by its name."""


def match_uses(
    graph: fx.Graph,
    parameters: Mapping[str, str],
    constants: Collection[str] = (),
    *,
    open_regions: bool = True,
    batch_dim: int = 0,
) -> GraphUses:
    """Account for every use of every parameter in a canonical graph.

    Args:
        graph: a graph after ``canonicalise_calls``: calls of layers are positional.
        parameters: node name to parameter name, for nodes that hold a parameter.
        constants: names of other nodes that hold no data of the examples, such as buffers.
        open_regions: account for uses in checkpointed regions too; else they are no sites.
        batch_dim: dimension of the examples in the inputs of layers whose channels are last.

    Returns:
        The sites (weight and bias are parameters of the model themselves, not functions of
        them) and every use of a parameter that is no site.
    """
    data = _nodes_with_examples(graph, {*parameters, *constants})
    without_gradient = {node for node in graph.nodes if _lets_no_gradient_through(node)}
    transformed = {node for node in graph.nodes if _is_transformed(node)}
    applied = {
        node: None if node in without_gradient | transformed else _applied_layer(node, parameters)
        for node in graph.nodes
    }
    unread = {node: _unread(call) if call else "" for node, call in applied.items()}
    calls = {
        node: call if call and call.x in data and not unread[node] else None
        for node, call in applied.items()
    }
    opened = regions(graph) if open_regions else ()
    inside = {region.call: _uses_inside(region, parameters, data, batch_dim) for region in opened}
    sites = []
    for node, call in calls.items():
        sites += [_site(node, call, parameters, batch_dim)] if call else []
        sites += inside[node].sites if node in inside else ()
    unmatched = [use for uses in inside.values() for use in uses.unmatched]
    for node, call in calls.items():
        if node in inside or node in without_gradient:
            continue
        matched = call.positions if call else frozenset()
        if _is_read_by_sites_only(node, calls):
            matched = frozenset((0,))
        lost = HIDING.get(_target_name(node), "")
        if applied[node] and not call:
            lost = unread[node] or NO_EXAMPLES
        if node in transformed:
            lost = TRANSFORMED
        reason = lost or OTHER_CALLS.get(_target_name(node), "")
        where = (node.name, _target_name(node), source_location(node))
        unmatched += [
            UnmatchedUse(name, *where, reason, bool(lost))
            for position, name in _parameter_arguments(node, parameters)
            if position not in matched
        ]
    return GraphUses(tuple(sites), tuple(unmatched))


def outputs_without_examples(graph: fx.Graph, without: Collection[str]) -> tuple[int, ...]:
    """Positions of a graph's outputs whose values do not depend on the model's inputs.

    Args:
        without: names of the placeholders that hold no data of the examples.
    """
    data = _nodes_with_examples(graph, without)
    output = next(node for node in graph.nodes if node.op == "output")
    results = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    return tuple(
        position
        for position, node in enumerate(results)
        if isinstance(node, fx.Node) and node not in data
    )


def _uses_inside(
    region: Region, parameters: Mapping[str, str], data: Collection[fx.Node], batch_dim: int
) -> GraphUses:
    """The uses in a region, whose operands may be parameters."""
    named = {
        inner.name: parameters[outer.name]
        for inner, outer in region.operands
        if isinstance(outer, fx.Node) and outer.name in parameters
    }
    without = [inner.name for inner, outer in region.operands if outer not in data]
    uses = match_uses(region.body.graph, named, without, open_regions=False, batch_dim=batch_dim)
    sites = tuple(replace(site, region=region.name) for site in uses.sites)
    return GraphUses(sites, uses.unmatched)


def _nodes_with_examples(graph: fx.Graph, without: Collection[str]) -> set[fx.Node]:
    """Nodes whose values depend on the model's inputs, and not on their sizes alone.

    The statistics of a layer are sums over examples. One that is applied to parameters or
    constants, such as an embedding of positions, receives the sum of all examples' gradients.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            live = node.name not in without
        else:
            live = any(used in found for used in node.all_input_nodes)
        if live and _carries_data(node):
            found.add(node)
    return found


def _carries_data(node: fx.Node) -> bool:
    """Whether a node can hold data: not if its example is known to be a size."""
    example = node.meta.get("example_value")
    return not isinstance(example, int | float | torch.SymInt | torch.SymFloat | torch.Size)


def _lets_no_gradient_through(node: fx.Node) -> bool:
    """Whether a node stands under ``no_grad``, or is no differentiable function: its inputs require
    gradients and none of its results does. What it does with a parameter is no use of it then."""
    results = _tensors(node.meta.get("kfc_call", node.meta.get("example_value")))
    if node.op not in ("call_function", "call_method") or not results:
        return False
    given = [t for used in node.all_input_nodes for t in _tensors(used.meta.get("example_value"))]
    if _is_transformed(node):
        return False  # what requires gradients is not to be seen from within
    return any(t.requires_grad for t in given) and not any(t.requires_grad for t in results)


def _is_transformed(node: fx.Node) -> bool:
    """Whether a node stands inside of ``vmap``, ``grad`` or ``jvp``."""
    around = [node, *node.all_input_nodes]
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for each in around
        for tensor in _tensors(each.meta.get("example_value"))
    )


def _tensors(example: object) -> list[torch.Tensor]:
    values = example if isinstance(example, tuple | list) else [example]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _unread(call: LayerCall) -> str:
    """Why the statistics of a call are not taken of the tensor that it reads, or an empty text."""
    example = call.x.meta.get("example_value") if isinstance(call.x, fx.Node) else None
    if not isinstance(example, torch.Tensor):
        return ""
    if example.is_nested and not call.layer.takes_nested:
        return NESTED
    return SPARSE if example.layout in SPARSE_LAYOUTS else ""


def _is_read_by_sites_only(node: fx.Node, calls: Mapping[fx.Node, LayerCall | None]) -> bool:
    """Whether a node is a view of a weight or bias, and nothing but layer calls reads it."""
    if not is_view(node):
        return False
    return all(
        _is_read_by_sites_only(user, calls)
        or ((call := calls[user]) is not None and node in (call.weight, call.bias))
        for user in node.users
    )


def _applied_layer(node: fx.Node, parameters: Mapping[str, str]) -> LayerCall | None:
    """The layer that a node applies, if its weight is a parameter."""
    found = (_of_parameters(node, call, parameters) for call in _candidates(node))
    return next(filter(None, found), None)


def _candidates(node: fx.Node) -> list[LayerCall]:
    call = layer_call(node)
    return ([call] if call else []) + batched_calls(node)


def _of_parameters(
    node: fx.Node, call: LayerCall, parameters: Mapping[str, str]
) -> LayerCall | None:
    """A call as it stands, if its weight is a parameter; without its bias, if that is none."""
    if not isinstance(call.x, fx.Node) or call.x.name in parameters:
        return None
    weight, bias = weight_view(call.weight), weight_view(call.bias)
    if weight is None or weight.base.name not in parameters:
        return None
    if call.kind == "linear" and dimensions(weight.base) == 3 and dimensions(call.weight) == 2:
        call = entry_of(call)
    if not _reads_its_kind(call, weight):
        return None
    if bias is None or bias.base.name not in parameters or _fits(call, bias, weight):
        return call
    # A bias that is cut in another way than the weight is a parameter of its own.
    others = frozenset(p for p in call.positions if node.args[p] is not call.bias)
    return replace(call, bias=None, positions=others)


def _reads_its_kind(call: LayerCall, weight: WeightView) -> bool:
    """Whether a layer of its kind may read a weight under such a view."""
    layer, base = call.layer, dimensions(weight.base)
    if base < layer.least_dimensions:
        return False
    if layer.slices == "entries":
        return base == 3
    if layer.slices == "rows":
        whole = not weight.rows or call.inputs_first == weight.transposed
        return dimensions(call.weight) == base and whole
    return not weight.rows and not (weight.transposed and base > 2)


def _fits(call: LayerCall, bias: WeightView, weight: WeightView) -> bool:
    """Whether a bias is cut as the weight is."""
    if call.layer.slices == "entries" and (entries := shape_of(weight.base)):
        shape = shape_of(bias.base) or ()
        return bias.rows == weight.rows and len(shape) in (2, 3) and shape[0] == entries[0]
    whole = call.layer.slices != "rows" or dimensions(bias.base) == 1
    return whole and bias.rows == weight.rows


def _site(
    node: fx.Node, call: LayerCall, parameters: Mapping[str, str], batch_dim: int
) -> SiteSpec:
    assert isinstance(call.x, fx.Node)
    weight, bias = weight_view(call.weight), weight_view(call.bias)
    assert weight is not None
    return SiteSpec(
        node=node.name,
        input_node=call.x.name,
        weight=parameters[weight.base.name],
        bias=parameters.get(bias.base.name) if bias else None,
        kind=call.kind,
        geometry=call.geometry,
        inputs_first=call.inputs_first != weight.transposed,
        location=source_location(node),
        padding_idx=call.padding_idx,
        norm=call.norm,
        rows=weight.rows,
        packed=call.packed,
        batch=call.batch,
        locations=locations_of(node, call, batch_dim),
    )


def _parameter_arguments(
    node: fx.Node, parameters: Mapping[str, str]
) -> list[tuple[int | None, str]]:
    """(position among the direct arguments or None, parameter name) for each use by a node."""
    found: list[tuple[int | None, str]] = []
    for position, argument in [*enumerate(node.args), (None, node.kwargs)]:
        used: list[fx.Node] = []
        map_arg(argument, used.append)
        at = position if isinstance(argument, fx.Node) else None
        found += [(at, parameters[n.name]) for n in used if n.name in parameters]
    return found


def _target_name(node: fx.Node) -> str:
    if node.op == "output":
        return "graph output"
    if isinstance(node.target, str):
        return f"{node.op} {node.target}"
    return getattr(node.target, "__name__", str(node.target))


def source_location(node: fx.Node) -> str:
    """Module path of the innermost module call around a node, or ""."""
    path, kind = module_of(node)
    return f"{path or 'the model itself'} ({kind})" if kind else ""
