"""The factors of every plain layer, by hooks on an uncompiled model and sums in float64.

Nothing here is shared with what it checks: forward hooks see the input of each call of a layer,
tensor hooks the gradient of its output, and the sums are plain products of the written-out patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfc_fx.plan.spec import BlockSpec, CurvaturePlan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its input and the gradient of its output."""

    x: Tensor
    gradient: Tensor


@dataclass
class LayerTruth:
    """What hooks saw of the layers of a model, by module path."""

    modules: Mapping[str, nn.Module]
    called: set[str] = field(default_factory=set)
    """Layers that were called with gradients enabled."""
    calls: dict[str, list[LayerCall]] = field(default_factory=dict)
    """Those of their calls that a gradient came back to."""

    def sums(
        self,
        block: BlockSpec,
        statistics: Mapping[str, Tensor | None],
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:
        """The sums of a block's statistics, in the form of those that are given.

        Args:
            block: of a layer that hooks have seen; its weight may be held by several modules.
            statistics: recorded ones, whose names and shapes say the form.
            dtype: of the products and sums.
        """
        total: dict[str, Tensor] = {}
        for path in self.paths(block.weight):
            for call in self.calls.get(path, ()):
                found = _sums(self.modules[path], block, call, statistics, dtype)
                for name, value in found.items():
                    total[name] = total[name] + value if name in total else value
        return total

    def rows(self, block: BlockSpec) -> list[int]:
        """Output locations of all examples, for each group of a block."""
        count = sum(
            _rows(self.modules[path], call)[1].shape[1]
            for path in self.paths(block.weight)
            for call in self.calls.get(path, ())
        )
        return [count] * block.groups

    def rounding(self, block: BlockSpec, statistics: Mapping[str, Tensor]) -> dict[str, float]:
        """The relative error of torch's own products and sums in float32, by statistic."""
        exact = self.sums(block, statistics)
        rounded = self.sums(block, statistics, torch.float32)
        return {name: relative_error(value, exact[name]) for name, value in rounded.items()}

    def paths(self, weight: str) -> list[str]:
        """Paths of the layers that hold a weight."""
        owner = weight.rpartition(".")[0]
        held = self.modules[owner].weight if owner in self.modules else None
        return [path for path, module in self.modules.items() if module.weight is held]


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch.nn whose forward pass is that layer's own."""
    return any(
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and not module._forward_hooks
        for kind in LAYERS
    )


@contextmanager
def watching_layers(model: nn.Module) -> Iterator[LayerTruth]:
    """While it lasts, forward and backward passes of an uncompiled model are seen."""
    layers = {
        path: module
        for path, module in model.named_modules()
        if is_plain_layer(module) and isinstance(module.weight, nn.Parameter)
    }
    truth = LayerTruth(layers)
    handles = [
        module.register_forward_hook(_seeing(truth, path), with_kwargs=True)
        for path, module in layers.items()
    ]
    try:
        yield truth
    finally:
        for handle in handles:
            handle.remove()


def _seeing(truth: LayerTruth, path: str) -> Callable[..., Tensor | None]:
    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor | None:
        if not (isinstance(y, Tensor) and y.requires_grad):
            return None
        truth.called.add(path)
        given = [*args, *kwargs.values()]
        if not isinstance(given[0], Tensor):
            return None
        x = given[0].detach().clone()
        y.register_hook(
            lambda g: truth.calls.setdefault(path, []).append(LayerCall(x, g.detach().clone()))
        )
        return y.clone()  # an operation in place may follow

    return see


def problems(
    plan: CurvaturePlan,
    sums: Mapping[str, Mapping[str, Tensor]],
    truth: LayerTruth,
    scale: float | None,
    tolerance: float = 1e-4,
    known_inputs: Mapping[str, Mapping[str, Tensor]] | None = None,
    rows: Mapping[str, list[int]] | None = None,
) -> tuple[list[str], float, int]:
    """How recorded statistics differ from the truth.

    A statistic is wrong that is off by more than the tolerance, and by more than twice what torch's
    own products and sums in float32 are off by.

    Args:
        sums: block to statistic to its recorded sum.
        scale: by which recorded Γ is larger; None to take it from the blocks themselves.
        known_inputs: sums of another pass on the same inputs, already compared: their statistics of
            inputs stand for the truth.
        rows: recorded counts N·|T| by block and group, to be compared too; every call of a layer
            must then have had a gradient.

    Returns:
        A line for every statistic that is wrong and every layer that was not captured; the worst
        relative error; how many statistics were compared.
    """
    found: list[str] = []
    errors: dict[str, float] = {}
    limits: dict[str, float] = {}
    products: dict[str, tuple[float, float, float]] = {}
    blocks = {block.weight: block for block in plan.blocks}
    reasons = {generic.name: generic.reason for generic in plan.generic}
    for path in truth.modules:
        weight = f"{path}.weight" if path else "weight"
        if path in truth.called and weight in reasons and _is_of_capture(reasons[weight]):
            found.append(f"{path} was called and has no block: {reasons[weight]}")
        block = blocks.get(weight)
        if block is None or path not in truth.called or block.sharing == "reduce":
            continue
        own = sums.get(block.name, {})
        known = (known_inputs or {}).get(block.name, {})
        wanted = {n: v for n, v in own.items() if n == "gamma" or n not in known}
        expected = truth.sums(block, wanted or {"omega": None, "gamma": None})
        expected |= {n: v for n, v in known.items() if n in own and n != "gamma"}
        if bool(expected) != bool(own):
            what = "has statistics and no gradient came to it" if own else "has no statistics"
            found.append(f"{block.name}: {what}")
            continue
        if own and rows is not None and rows[block.name] != truth.rows(block):
            found.append(f"{block.name} has {rows[block.name]} rows, not {truth.rows(block)}")
        for name, value in expected.items():
            label = f"{block.name}.{name}"
            if name != "gamma" or scale is not None:
                value = value * scale if name == "gamma" and scale is not None else value
                errors[label] = error = relative_error(own[name], value)
                if error > tolerance and name not in known:
                    rounding = truth.rounding(block, own).get(name, 0.0)
                    limits[label] = max(tolerance, 2 * rounding)
            else:
                products[label] = _products(own[name], value)
    ratios = sorted((own / true) ** 0.5 for own, _, true in products.values() if true)
    scale = ratios[len(ratios) // 2] if ratios else 1.0
    errors |= {label: _error_at(scale, *three) for label, three in products.items()}
    found += [
        f"{label} is off by {error:.1e}"
        for label, error in errors.items()
        if not error <= limits.get(label, tolerance)
    ]
    return found, max(errors.values(), default=0.0), len(errors)


def _products(own: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """``own · own``, ``own · expected`` and ``expected · expected``."""
    if own.shape != expected.shape:
        return float("inf"), 0.0, 1.0
    wide = own.to(expected.dtype)
    return tuple(
        float((a * b).sum()) for a, b in ((wide, wide), (wide, expected), (expected, expected))
    )  # type: ignore[return-value]


def _error_at(scale: float, own: float, mixed: float, expected: float) -> float:
    """The relative error of ``own`` against the truth times ``scale``, from their products."""
    squared = max(0.0, own - 2 * scale * mixed + scale**2 * expected)
    norm = scale * expected**0.5
    return squared**0.5 / norm if norm else (0.0 if own == 0 else float("inf"))


def relative_error(own: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    if own.shape != expected.shape:
        return float("inf")
    norm = float(expected.norm())
    difference = float((own.to(expected.dtype) - expected).norm())
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def _is_of_capture(reason: str) -> bool:
    return "not used in any captured graph" in reason or "plain Python" in reason


# -- sums ----------------------------------------------------------------------------------


def _sums(
    layer: nn.Module,
    block: BlockSpec,
    call: LayerCall,
    statistics: Mapping[str, Tensor | None],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    inputs, outputs = (
        rows.to(dtype) for rows in _rows(layer, call)
    )  # [groups, rows, D], [groups, rows, R]
    found: dict[str, Tensor] = {}
    if "gamma" in statistics:
        found["gamma"] = _gram(outputs, statistics["gamma"])
    if "channel" in statistics:
        cut = inputs.unflatten(2, (block.channels, block.offsets))
        found["channel"] = torch.einsum("gnco,gndo->gcd", cut, cut)
        found["offset"] = torch.einsum("gnco,gncp->gop", cut, cut)
    elif "omega" in statistics:
        omega = statistics["omega"]
        cut_in_parts = omega is not None and len(omega) > block.groups
        if block.bias is not None and not cut_in_parts:
            inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
        if isinstance(layer, nn.Embedding):
            found["omega"] = inputs.sum(1)[:, None]
        else:
            found["omega"] = _gram(inputs, omega)
    return found


def _gram(rows: Tensor, like: Tensor | None) -> Tensor:
    """``Σ r rᵀ`` of each group, or of each equal part, or its diagonal as a row or a column."""
    if like is None:
        return rows.mT @ rows
    if like.shape[-1] != like.shape[-2]:
        squares = rows.square().sum(1)
        return squares[:, None] if like.shape[-2] == 1 else squares[:, :, None]
    parts = len(like) // len(rows)
    if parts > 1:
        rows = torch.cat([torch.stack(own.tensor_split(parts, -1)) for own in rows])
    return rows.mT @ rows


def _rows(layer: Any, call: LayerCall) -> tuple[Tensor, Tensor]:
    x, g = call.x, call.gradient.double()
    if isinstance(layer, nn.Embedding):
        rows = F.one_hot(x.reshape(-1), layer.num_embeddings).double()
        if layer.padding_idx is not None:
            rows[:, layer.padding_idx] = 0
        return rows[None], g.reshape(1, -1, g.shape[-1])
    if isinstance(layer, nn.Linear):
        x = x.double()
        return x.reshape(1, -1, x.shape[-1]), g.reshape(1, -1, g.shape[-1])
    spatial = len(layer.kernel_size)
    x = x.double()
    x, g = (t[None] if t.dim() == spatial + 1 else t for t in (x, g))
    if isinstance(layer, TRANSPOSED):
        return _pixels(x, layer.groups), _transposed_patches(layer, x, g)
    return _patches(layer, x), _pixels(g, layer.groups)


def _pixels(x: Tensor, groups: int) -> Tensor:
    """``[groups, N · locations, C / groups]``."""
    cut = x.unflatten(1, (groups, -1)).flatten(3)  # [N, groups, C, T]
    return cut.permute(1, 0, 3, 2).flatten(1, 2)


def _patches(layer: Any, x: Tensor) -> Tensor:
    """``[groups, N · locations, C / groups · offsets]``."""
    sizes, strides, dilations = layer.kernel_size, layer.stride, layer.dilation
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, sizes, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    elif layer.padding == "valid":
        pads = [(0, 0)] * len(sizes)
    else:
        pads = [(p, p) for p in layer.padding]
    x = F.pad(x, [p for pair in reversed(pads) for p in pair], mode=mode)
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(x.shape[2:], dilations, sizes, strides, strict=True)
    ]
    return _gathered(x, counts, sizes, strides, dilations, layer.groups)


def _gathered(
    x: Tensor, counts: Any, sizes: Any, strides: Any, dilations: Any, groups: int
) -> Tensor:
    for axis in range(len(sizes)):
        at = torch.arange(counts[axis])[:, None] * strides[axis]
        at = at + torch.arange(sizes[axis])[None] * dilations[axis]
        position = 2 + 2 * axis  # [N, C, out, k, out, k, ...]
        x = x.index_select(position, at.flatten()).unflatten(position, at.shape)
    dims = len(sizes)
    outs, offsets = [2 + 2 * a for a in range(dims)], [3 + 2 * a for a in range(dims)]
    x = x.permute(0, *outs, 1, *offsets)  # [N, out..., C, k...]
    x = x.reshape(x.shape[0] * prod(counts), groups, -1)
    return x.transpose(0, 1)


def _transposed_patches(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    """The patch of the output's gradient at each location of the input."""
    counts, sizes = list(x.shape[2:]), layer.kernel_size
    pads = []
    for axis, count in enumerate(counts):
        before = layer.padding[axis]
        needed = layer.stride[axis] * (count - 1) + layer.dilation[axis] * (sizes[axis] - 1) + 1
        pads.append((before, max(0, needed - before - g.shape[2 + axis])))
    g = F.pad(g, [p for pair in reversed(pads) for p in pair])
    return _gathered(g, counts, sizes, layer.stride, layer.dilation, layer.groups)
