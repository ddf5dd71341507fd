"""What a step costs: the work of the gradient, of the statistics, of a refresh, of an update.

Every number is counted from the code that runs, on tensors without data: the captured graphs
and their emissions for the inputs of the capture, and the generated functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from kfc_fx.capture.nodes import concrete, example_of
from kfc_fx.capture.regions import regions
from kfc_fx.compilation.captured_graph import BoundGraph
from kfc_fx.inspect.counting import Work, WorkCounter
from kfc_fx.inspect.methods import OpCall, StatisticsObserver, counted_call
from kfc_fx.inspect.nodes import shown_shape
from kfc_fx.statistics.emission import emit
from kfc_fx.statistics.input_factors import input_statistics
from kfc_fx.statistics.record import Destination, ForwardRecord, probe_for
from kfc_fx.statistics.running import forward_shares
from kfc_fx.statistics.share import WHOLE, BatchShare


@dataclass(frozen=True)
class SiteCost:
    """The statistics of one site of a block."""

    block: str
    work: Work
    calls: tuple[OpCall, ...]


@dataclass(frozen=True)
class PassWork:
    """The work of a forward and a backward pass, and operators whose operations are unknown."""

    forward: Work
    backward: Work
    uncounted: frozenset[str]


def site_costs(graph: BoundGraph, share: BatchShare = WHOLE) -> list[SiteCost]:
    """The work of every emission of a graph, and of every input statistic, each run by itself.

    Args:
        share: of the batch, that statistics are estimated from.
    """
    module = graph.stages[-1].module
    bodies = [region.body for region in regions(module.graph)]
    nodes = [node for own in (module, *bodies) for node in own.graph.nodes]
    costs: dict[Any, Callable[[fx.Node, BatchShare], SiteCost]]
    costs = {emit: _site_cost, input_statistics: _input_cost}
    return [costs[node.target](node, share) for node in nodes if node.target in costs]


def _input_cost(node: fx.Node, share: BatchShare) -> SiteCost:
    observer = StatisticsObserver()
    (inputs,), options = _call_without_data(node)
    with forward_shares(lambda _block, _traced: share):
        run = partial(input_statistics, inputs, **options)
        work = counted_call(observer.counter, run)
    return SiteCost(node.meta["kfc_block"], work, tuple(observer.calls))


def _site_cost(node: fx.Node, share: BatchShare) -> SiteCost:
    observer = StatisticsObserver()
    (y, inputs, leaves), options = _call_without_data(node)
    to = Destination(ForwardRecord("sampled", share, running=True), "", "", quadratic=False)
    probes = tuple(probe_for(leaf, to) for leaf in leaves)
    output = emit(y.requires_grad_(), inputs, probes, **options)

    def backward() -> None:
        torch.autograd.grad(output, leaves, torch.empty_like(output))

    work = counted_call(observer.counter, backward)
    return SiteCost(node.meta["kfc_block"], work, tuple(observer.calls))


def _call_without_data(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call, with tensors without data for the nodes among them."""
    return map_arg(node.args, _without_data), dict(node.kwargs)  # type: ignore[return-value]


def _without_data(argument: fx.Node) -> Tensor:
    shape = shown_shape(argument)
    assert shape is not None
    if _is_probe(argument):
        return torch.empty((), device="meta").expand(shape).requires_grad_()
    dtype = example_of(argument).dtype  # type: ignore[attr-defined]
    return torch.empty(shape, dtype=dtype, device="meta")


def _is_probe(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and "kfc_probe" in argument.meta


def gradient_work(graph: BoundGraph) -> PassWork:
    """Forward and backward pass of the plain graph, with the gradients of its parameters."""
    return _passes(graph.stages[0].module, _trained)


def fisher_work(graph: BoundGraph) -> Work:
    """The backward pass that brings the sampled cotangent to the sites, and no statistics."""
    module = graph.stages[-1].module
    if not any(map(_is_probe, module.graph.nodes)):
        return Work()
    return _passes(module, lambda _, node: _is_probe(node)).backward


def _trained(value: Any, _: fx.Node | None) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _passes(module: fx.GraphModule, wanted: Callable[[Any, fx.Node | None], bool]) -> PassWork:
    """The work of a forward pass, and of the gradients of the inputs that are ``wanted``."""
    mode, counter = FakeTensorMode(allow_non_fake_inputs=True), WorkCounter()
    with mode:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        inputs = [_fake(node) for node in placeholders]
        attributes = _fake_attributes(module, mode)
        pairs = [*zip(inputs, placeholders, strict=True), *((a, None) for a in attributes.values())]
        leaves = [value for value, node in pairs if wanted(value, node)]
        for value, _ in pairs:
            if isinstance(value, Tensor) and value.is_floating_point():
                value.requires_grad_(any(value is leaf for leaf in leaves))
        outputs: list[Any] = []
        with torch.enable_grad():
            run = _Interpreter(module, attributes).run
            forward = counted_call(counter, lambda: outputs.append(run(*inputs)))
            backward = counted_call(counter, lambda: _backward(outputs, leaves))
    return PassWork(forward, backward, frozenset(counter.uncounted))


def _backward(outputs: Any, leaves: Sequence[Tensor]) -> None:
    ends = [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]
    if leaves and ends:
        torch.autograd.grad(ends, leaves, [torch.empty_like(e) for e in ends], allow_unused=True)


def _fake(node: fx.Node) -> Any:
    """A value like the placeholder's example, with numbers for dynamic sizes."""
    shape, value = shown_shape(node), example_of(node)
    if _is_probe(node):
        return torch.empty(()).expand(node.meta["shape"])
    if shape is None:
        return concrete(value) if isinstance(value, torch.SymInt) else value
    fake = torch.empty(shape, dtype=value.dtype, device=value.device)  # type: ignore[attr-defined]
    return fake.requires_grad_(value.requires_grad)  # type: ignore[attr-defined]


def _fake_attributes(module: fx.GraphModule, mode: FakeTensorMode) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: mode.from_tensor(value).detach().requires_grad_(value.requires_grad)
        for name, value in tensors.items()
    }


class _Interpreter(fx.Interpreter):
    """Runs a graph with fake tensors in place of the tensors that its module holds."""

    def __init__(self, module: fx.GraphModule, attributes: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self._attributes = attributes

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        known = self._attributes.get(target)
        return super().get_attr(target, args, kwargs) if known is None else known

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        own = {
            name.removeprefix(f"{target}."): value
            for name, value in self._attributes.items()
            if name.startswith(f"{target}.")
        }
        return torch.func.functional_call(self.fetch_attr(target), own, args, kwargs)
