"""Capture by ``symbolic_trace``: looks at a model without running it, and bakes branches in.

What a Python ``if`` decides, ``self.training`` among it, is fixed in the graph, so that nothing
should train from one. Layers become the functions that they apply, and fake tensors give shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kfc_fx.errors import CaptureError, first_line


def symbolic_graph(model: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The model's graph for inputs of these shapes; nothing is computed.

    Raises:
        CaptureError: the model does something that ``symbolic_trace`` cannot follow, or does
            not take such inputs.
    """
    tracer = fx.Tracer()
    try:
        module = fx.GraphModule(model, tracer.trace(model))
    except Exception as error:
        raise CaptureError(
            f"symbolic_trace cannot follow {type(model).__name__}: {first_line(error)}; "
            "capture by dynamo takes any Python"
        ) from error
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            _spell_layer(module, node)
    module.graph.lint()
    module.recompile()
    _keep_shapes(module, inputs)
    return module


def refuse_to_run(*_: Any, **__: Any) -> Any:
    """Stands in for the forward pass of a model that was captured to be looked at.

    Raises:
        CaptureError: always.
    """
    raise CaptureError(
        "this model was captured by symbolic_trace, which fixes Python branches and the training "
        "flag: it is for looking. Compile the model anew to train it"
    )


def _keep_shapes(module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Run the graph on fake tensors and keep each node's value as its example."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parameters: dict[str, Tensor] = {
        name: mode.from_tensor(value)
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    }
    try:
        with mode:
            _ShapeRecorder(module, parameters).run(*map(mode.from_tensor, inputs))
    except Exception as error:
        raise CaptureError(
            f"the model does not take inputs of {[tuple(x.shape) for x in inputs]}: "
            f"{first_line(error)}"
        ) from error


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, fakes: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.fakes = fakes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["example_value"] = value
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fakes.get(target, super().get_attr(target, args, kwargs))


def _spell_layer(module: fx.GraphModule, node: fx.Node) -> None:
    """A call of a layer's module as a call of a function that takes its parameters.

    Of the layers below it is the function that they apply; of others that hold parameters,
    ``functional_call``, so that no use of a parameter is hidden inside of a module.
    """
    layer = module.get_submodule(str(node.target))
    graph, path = module.graph, str(node.target)
    with graph.inserting_before(node):
        held = [*layer.named_parameters(), *layer.named_buffers()]
        attributes: dict[str, Any] = {name: graph.get_attr(f"{path}.{name}") for name, _ in held}
        for attribute in attributes.values():
            attribute.meta = dict(node.meta)
        if type(layer) in LAYERS and len(node.args) == 1 and not node.kwargs:
            own = {**dict.fromkeys([*layer._parameters, *layer._buffers]), **attributes}
            spelled = LAYERS[type(layer)](layer, node.args[0], own)
        elif attributes:
            called = (graph.get_attr(path), (attributes,), node.args, dict(node.kwargs))
            spelled = torch.func.functional_call, called
        else:
            return
    node.op = "call_function"
    node.target, node.args = spelled
    node.kwargs = {}
    for attribute in attributes.values():
        if not attribute.users:
            graph.erase_node(attribute)


Call = tuple[Callable[..., Any], tuple[Any, ...]]
Attributes = dict[str, Any]


def _linear(_: Any, x: Any, own: Attributes) -> Call:
    return F.linear, (x, own["weight"], own["bias"])


def _convolution(layer: Any, x: Any, own: Attributes) -> Call:
    function, padding = getattr(torch, f"conv{len(layer.kernel_size)}d"), layer.padding
    if layer.padding_mode != "zeros":
        pads = list(layer._reversed_padding_repeated_twice)
        x, padding = x.graph.call_function(F.pad, (x, pads, layer.padding_mode)), 0
    numbers = (layer.stride, padding, layer.dilation, layer.groups)
    return function, (x, own["weight"], own["bias"], *numbers)


def _transposed(layer: Any, x: Any, own: Attributes) -> Call:
    function = getattr(torch, f"conv_transpose{len(layer.kernel_size)}d")
    numbers = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    return function, (x, own["weight"], own["bias"], *numbers)


def _embedding(layer: Any, x: Any, own: Attributes) -> Call:
    return F.embedding, (x, own["weight"], layer.padding_idx)


def _batch_norm(layer: Any, x: Any, own: Attributes) -> Call:
    training = layer.training or layer.running_mean is None
    statistics = (own["running_mean"], own["running_var"], own["weight"], own["bias"])
    momentum = 0.0 if layer.momentum is None else layer.momentum
    return F.batch_norm, (x, *statistics, training, momentum, layer.eps)


def _layer_norm(layer: Any, x: Any, own: Attributes) -> Call:
    return F.layer_norm, (x, layer.normalized_shape, own["weight"], own["bias"], layer.eps)


def _group_norm(layer: Any, x: Any, own: Attributes) -> Call:
    return F.group_norm, (x, layer.num_groups, own["weight"], own["bias"], layer.eps)


def _rms_norm(layer: Any, x: Any, own: Attributes) -> Call:
    return F.rms_norm, (x, layer.normalized_shape, own["weight"], layer.eps)


LAYERS: dict[type[nn.Module], Callable[[Any, Any, Attributes], Call]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.RMSNorm: _rms_norm,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
}
"""Layers whose call is spelled as a function of the matcher's, by exact type."""
