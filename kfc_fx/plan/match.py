"""Find the uses of parameters in a canonical graph: sites of blocks, and everything else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch.fx.node import map_arg

from kfc_fx.plan.geometry import LINEAR, ConvGeometry, conv_geometry
from kfc_fx.plan.spec import BlockKind, GraphUses, SiteSpec, UnmatchedUse

CONVOLUTIONS: dict[object, BlockKind] = {
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
}
LINEAR_TARGET = torch.nn.functional.linear


def match_uses(graph: fx.Graph, parameters: Mapping[str, str]) -> GraphUses:
    """Account for every use of every parameter in a canonical graph.

    Args:
        graph: a graph after ``canonicalise_calls``: conv and linear calls are positional.
        parameters: node name to parameter name, for nodes that hold a parameter.

    Returns:
        The sites (weight and bias are parameters of the model themselves, not functions of
        them) and every use of a parameter that is no site.
    """
    sites, unmatched = [], []
    for node in graph.nodes:
        site = _match_site(node, parameters)
        if site is not None:
            sites.append(site)
        in_site = {} if site is None else {1: site.weight, 2: site.bias}
        unmatched += [
            UnmatchedUse(name, node.name, _target_name(node), source_location(node))
            for position, name in _parameter_arguments(node, parameters)
            if in_site.get(position) != name  # type: ignore[arg-type]
        ]
    return GraphUses(tuple(sites), tuple(unmatched))


def _match_site(node: fx.Node, parameters: Mapping[str, str]) -> SiteSpec | None:
    kind = "linear" if node.target is LINEAR_TARGET else CONVOLUTIONS.get(node.target)
    if node.op != "call_function" or kind is None:
        return None
    x, weight, bias = node.args[:3]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if weight.name not in parameters or weight.meta["example_value"].dim() < 2:
        return None
    geometry = LINEAR if kind == "linear" else _geometry(node, weight)
    if geometry is None:
        return None
    return SiteSpec(
        node=node.name,
        input_node=x.name,
        weight=parameters[weight.name],
        bias=parameters.get(bias.name) if isinstance(bias, fx.Node) else None,
        kind=kind,
        geometry=geometry,
        location=source_location(node),
    )


def _geometry(node: fx.Node, weight: fx.Node) -> ConvGeometry | None:
    kernel = tuple(weight.meta["example_value"].shape[2:])
    stride, padding, dilation, groups = node.args[3:7]
    numbers = [stride, padding, dilation, groups]
    if any(isinstance(n, fx.Node) for value in numbers for n in _leaves(value)):
        return None  # a stride or padding that is computed in the graph
    return conv_geometry(kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)  # type: ignore[arg-type]


def _leaves(value: object) -> list[object]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _parameter_arguments(
    node: fx.Node, parameters: Mapping[str, str]
) -> list[tuple[int | None, str]]:
    """(position among the direct arguments or None, parameter name) for each use by a node."""
    found: list[tuple[int | None, str]] = []
    for position, argument in enumerate(node.args):
        direct = isinstance(argument, fx.Node)

        def note(used: fx.Node, at: int | None = position if direct else None) -> fx.Node:
            if used.name in parameters:
                found.append((at, parameters[used.name]))
            return used

        map_arg(argument, note)
    map_arg(node.kwargs, lambda used: note(used, None))
    return found


def _target_name(node: fx.Node) -> str:
    if node.op == "output":
        return "graph output"
    if isinstance(node.target, str):
        return f"{node.op} {node.target}"
    return getattr(node.target, "__name__", str(node.target))


def source_location(node: fx.Node) -> str:
    """Module path of the innermost module call around a node, or ""."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, module_type = list(stack.values())[-1]
    kind = module_type if isinstance(module_type, str) else module_type.__name__
    return f"{module_path(path)} ({kind.rsplit('.', 1)[-1]})"


def module_path(path: str) -> str:
    """``layer1.0.conv1`` from dynamo's spelling of the same path."""
    for prefix in ("L['model']", "L['self']", "model"):
        path = path.removeprefix(prefix)
    path = path.replace("._modules", "").replace("['", ".").replace("']", "")
    return path.strip(".")
