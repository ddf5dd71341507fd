"""Exact Fisher-vector products: ``vᵀ F v`` of the whole network, by forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kfc_fx.curvature.likelihood import Likelihood
from kfc_fx.curvature.outputs import find_prediction
from kfc_fx.errors import KfcError


def fisher_quadratic_form(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    vectors: Mapping[str, Tensor],
    samples: int | None = None,
) -> Tensor:
    """``vᵀ F v`` with ``F = (1/N) Σ_n J_nᵀ F_z J_n``, J the Jacobian of the output.

    One forward-mode pass gives ``J v``; the Fisher matrix F_z of the output is known in closed
    form (Schraudolph 2002; Martens & Grosse 2015, section 6.4).

    Args:
        model: run in its own mode; buffers and random number generators stay as they are.
        inputs: positional and keyword arguments of the forward pass, examples first.
        vectors: v by parameter name, each of its parameter's shape; others are zero.
        samples: use the first so many examples; all by default.

    Raises:
        KfcError: an op of the model has no forward-mode derivative.
    """
    args, kwargs = _first_examples(inputs, samples)
    parameters = {name: p.detach() for name, p in model.named_parameters() if name in vectors}
    tangents = {name: vectors[name].to(p.dtype) for name, p in parameters.items()}

    def predict(chosen: dict[str, Tensor]) -> Tensor:
        # Copies made inside the transform: batch norm may write to them.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = torch.func.functional_call(model, {**buffers, **chosen}, args, kwargs)
        return find_prediction(output)

    devices = sorted({p.device.index for p in parameters.values() if p.device.type == "cuda"})
    try:
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            # torch scripts its own forward-mode formulas and warns of it.
            warnings.filterwarnings("ignore", "`torch.jit.script`", FutureWarning)
            warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
            output, tangent = torch.func.jvp(predict, (parameters,), (tangents,))  # type: ignore[misc]
    except (RuntimeError, NotImplementedError) as error:
        raise KfcError(
            "the exact ν needs a forward-mode derivative of the whole model, and it failed: "
            f"{error}. "
            "Use clip_by='factors', which needs none"
        ) from error
    wide = torch.promote_types(output.dtype, torch.float32)
    examples = likelihood.examples(output)
    return likelihood.curvature(output.to(wide), tangent.to(wide)) / examples


def _first_examples(
    inputs: tuple[tuple[Any, ...], dict[str, Any]], samples: int | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if samples is None:
        return inputs
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if _has_examples(leaf)]
    batch = sizes[0] if sizes else 0
    return pytree.tree_map(
        lambda leaf: leaf[:samples] if _has_examples(leaf) and leaf.shape[0] == batch else leaf,
        inputs,
    )


def _has_examples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
