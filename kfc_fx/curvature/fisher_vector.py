"""Exact Fisher-vector products: ``vᵀ F v`` of the whole network, by forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kfc_fx.curvature.inputs import Inputs, first_examples
from kfc_fx.curvature.likelihood import Likelihood
from kfc_fx.curvature.outputs import find_prediction
from kfc_fx.errors import KfcError


def fisher_quadratic_form(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Inputs,
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
    args, kwargs = first_examples(inputs, samples)
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
