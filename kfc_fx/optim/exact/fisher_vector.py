"""Exact products with the Fisher matrix of the whole network, by forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kfc_fx.errors import KfcError
from kfc_fx.statistics.inputs import Inputs, first_examples
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.outputs import find_prediction

Vector = Mapping[str, Tensor]
"""By parameter name, of the parameter's shape; zero where a name is missing."""


def fisher_gram(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Inputs,
    vectors: Sequence[Vector],
    *,
    samples: int | None = None,
    parameters: Vector | None = None,
    output_path: str | None = None,
    batch_dims: tuple[int, int] = (0, 0),
) -> Tensor:
    """``vᵢᵀ F vⱼ`` with ``F = (1/N) Σ_n J_nᵀ F_z J_n``, J the Jacobian of the output.

    One forward-mode pass a vector gives ``J v``; the Fisher matrix F_z of the output is known in
    closed form (Schraudolph 2002; Martens & Grosse 2015, section 6.4).

    Args:
        model: run in its own mode; buffers and random number generators stay as they are.
        inputs: positional and keyword arguments of the forward pass, examples first.
        vectors: k vectors of the same names.
        samples: use the first so many examples; all by default.
        parameters: values of the parameters to take F at; by default the model's own.
        output_path: of the prediction in the model's output, where it has several tensors.
        batch_dims: dimension of the examples in the inputs and in the output.

    Returns:
        ``[k, k]``, symmetric.

    Raises:
        KfcError: an op of the model has no forward-mode derivative.
    """
    args, kwargs = first_examples(inputs, samples, batch_dims[0])
    own = {name: p.detach() for name, p in model.named_parameters()} | dict(parameters or {})
    moved = {name: p for name, p in own.items() if any(name in vector for vector in vectors)}

    def predict(chosen: dict[str, Tensor]) -> Tensor:
        # Copies made inside the transform: batch norm may write to them.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = torch.func.functional_call(model, {**buffers, **own, **chosen}, args, kwargs)
        return find_prediction(output, output_path)

    devices = sorted({p.device.index for p in moved.values() if p.device.type == "cuda"})
    tangents: list[Tensor] = []
    for vector in vectors:
        along = {
            name: vector[name].to(p.dtype) if name in vector else torch.zeros_like(p)
            for name, p in moved.items()
        }
        try:
            with (
                torch.random.fork_rng(devices),  # dropout is the same for each
                torch.no_grad(),
                warnings.catch_warnings(),
            ):
                # torch scripts its own forward-mode formulas and warns of it.
                warnings.filterwarnings("ignore", "`torch.jit.script`", FutureWarning)
                warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
                output, tangent = torch.func.jvp(predict, (moved,), (along,))  # type: ignore[misc]
        except (RuntimeError, NotImplementedError) as error:
            raise KfcError(
                "products with the exact Fisher matrix need a forward-mode derivative of the whole "
                f"model, and it failed: {error}. Use clip_by='factors', which needs none"
            ) from error
        tangents.append(tangent)
    wide = torch.promote_types(output.dtype, torch.float32)
    likelihood.check(output)
    examples = likelihood.examples(output, batch_dims[1])
    return likelihood.curvature(output.to(wide), torch.stack(tangents).to(wide)) / examples
