"""Curvature by per-example loops in float64: slow, plain, and independent of the package.

Networks are run by ``_call_impl``, past what ``kfc_fx.compile`` has put on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Patches of one example, ``[groups, T, D]``, by indexing one location at a time."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(1, -1, x.shape[-1])
    elif isinstance(layer, nn.Embedding):
        onehot = F.one_hot(x.reshape(-1), layer.num_embeddings).to(layer.weight.dtype)
        return onehot[None] if layer.padding_idx is None else _without(onehot, layer.padding_idx)
    elif layer.transposed:
        return x.reshape(layer.groups, x.shape[0] // layer.groups, -1).transpose(1, 2)
    else:
        rows = _conv_patches(layer, x)
    if layer.bias is not None and layer.bias.requires_grad:
        rows = torch.cat([rows, torch.ones(*rows.shape[:2], 1, dtype=rows.dtype)], 2)
    return rows


def _conv_patches(layer: nn.Module, x: Tensor) -> Tensor:
    ndim = len(layer.kernel_size)
    pads = _pads(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x[None], [p for pair in reversed(pads) for p in pair], mode=mode)[0]
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    out = [
        (padded.shape[1 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in range(ndim)
    ]
    rows = []
    for location in itertools.product(*map(range, out)):
        window = tuple(
            slice(
                location[d] * stride[d],
                location[d] * stride[d] + dilation[d] * (kernel[d] - 1) + 1,
                dilation[d],
            )
            for d in range(ndim)
        )
        rows.append(padded[(slice(None), *window)].reshape(layer.groups, -1))
    return torch.stack(rows, 1)


def _without(onehot: Tensor, token: int) -> Tensor:
    return onehot.index_fill(1, torch.tensor([token]), 0)[None]


def _transposed_patches(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Patches of one output gradient at the input's locations, ``[groups, T, C_out/g * |Δ|]``."""
    rows = []
    for location in itertools.product(*map(range, x.shape[1:])):
        entries = []
        for offset in itertools.product(*map(range, layer.kernel_size)):
            position = [
                s * t + d * k - p
                for s, t, d, k, p in zip(
                    layer.stride, location, layer.dilation, offset, layer.padding, strict=True
                )
            ]
            inside = all(0 <= q < size for q, size in zip(position, g.shape[1:], strict=True))
            entries.append(g[(slice(None), *position)] if inside else g.new_zeros(g.shape[0]))
        rows.append(torch.stack(entries, 1).reshape(layer.groups, -1))
    return torch.stack(rows, 1)


def _pads(layer: nn.Module) -> list[tuple[int, int]]:
    if layer.padding == "same":
        totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    return [(p, p) for p in layer.padding]


def output_rows(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Output gradients of one example, ``[groups, T, R]``."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        return g.reshape(1, -1, g.shape[-1])
    if layer.transposed:
        return _transposed_patches(layer, x, g)
    return g.reshape(layer.groups, g.shape[0] // layer.groups, -1).transpose(1, 2)


def exact_factors(
    net: nn.Module,
    layer: nn.Module,
    x: Tensor,
    cotangent: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Ω ``[groups, D, D]`` and Γ ``[groups, R, R]`` of one layer, example by example.

    Args:
        cotangent: from the output of one example ``[1, ...]`` and its index to the derivative of
            its log-likelihood.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.append((args[0], out))
        return out.clone()  # an in-place activation may follow

    handle = layer.register_forward_hook(keep)
    omega, gamma, rows = 0, 0, 0
    for n in range(x.shape[0]):
        seen.clear()
        output = net._call_impl(x[n : n + 1])
        calls = list(seen)
        grads = torch.autograd.grad(output, [out for _, out in calls], cotangent(output, n))
        for (inputs, _), grad in zip(calls, grads, strict=True):
            patches = layer_patches(layer, inputs[0].detach())
            g = output_rows(layer, inputs[0].detach(), grad[0])
            omega = omega + patches.mT @ patches
            gamma = gamma + g.mT @ g
            rows += g.shape[1]
    handle.remove()
    return omega / x.shape[0], gamma / rows


def categorical_cotangent(targets: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Cotangents of cross-entropy for given targets, one a example."""

    def cotangent(output: Tensor, n: int) -> Tensor:
        onehot = F.one_hot(targets[n : n + 1], output.shape[-1]).to(output.dtype)
        return output.detach().softmax(-1) - onehot

    return cotangent


def matrix_of(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[W b]`` as ``[groups, R, D]``."""
    groups = getattr(layer, "groups", 1)
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    if bias is not None:
        matrix = torch.cat([matrix, bias.reshape(groups, -1, 1)], 2)
    return matrix


def parameters_of(layer: nn.Module, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The inverse of :func:`matrix_of`."""
    if layer.bias is None:
        return matrix.reshape(layer.weight.shape), None
    return matrix[:, :, :-1].reshape(layer.weight.shape), matrix[:, :, -1].reshape(-1)


def batched_factors(
    net: nn.Module,
    layer: nn.Module,
    x: Tensor,
    cotangent: Callable[[Tensor, int], Tensor],
    rows_of: Callable[[tuple[Tensor, ...], Tensor], list[tuple[Tensor, Tensor]]],
) -> tuple[Tensor, Tensor]:
    """Ω ``[E, D, D]`` and Γ ``[E, R, R]`` of a layer with a map for each of E entries.

    Args:
        rows_of: from the layer's arguments for one example, and the gradient of its output, to
            the input rows and gradient rows of every entry.
    """
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append((args, out))

    handle = layer.register_forward_hook(keep)
    bias = getattr(layer, "bias", None) is not None
    omegas, gammas, counts = [], [], []
    for n in range(x.shape[0]):
        seen.clear()
        output = net._call_impl(x[n : n + 1])
        ((args, out),) = seen
        (g,) = torch.autograd.grad(output, out, cotangent(output, n))
        entries = rows_of(tuple(a.detach() for a in args), g)
        for own, _ in entries:
            assert own.ndim == 2
        ones = [a.new_ones(len(a), int(bias)) for a, _ in entries]
        patches = [torch.cat([a, one], 1) for (a, _), one in zip(entries, ones, strict=True)]
        omegas.append(torch.stack([sum_of_squares(p) for p in patches]))
        gammas.append(torch.stack([sum_of_squares(own) for _, own in entries]))
        counts.append(torch.tensor([len(own) for _, own in entries]))
    handle.remove()
    rows = sum(counts).clamp(min=1).reshape(-1, 1, 1)
    return sum(omegas) / x.shape[0], sum(gammas) / rows


def sum_of_squares(rows: Tensor) -> Tensor:
    """``Σ_r x_r x_rᵀ`` by a loop over the rows."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    for row in rows:
        total = total + torch.outer(row, row)
    return total
