"""The nearest semi-orthogonal matrix, by products alone. The generated update calls these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_matmul import matmul

COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""Of the odd polynomials ``a x + b x³ + c x⁵`` whose composition is closest to the sign function
on [0.001, 1] (Amsel et al. 2025, "The Polar Express", algorithm 1)."""

SAFETY = 1.01
"""The paper's margin: rounding must not push a singular value out of the interval."""

SCHEDULE = (
    COEFFICIENTS[0],
    *((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in COEFFICIENTS[1:]),
)
"""The polynomials with the margin, which the first has in the norm of its argument."""

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Of one polynomial for all steps, which raises small singular values most (Jordan 2024, Muon)."""


def polar_factor(matrix: Tensor) -> Tensor:
    """``U Vᵀ`` of the singular value decomposition ``U S Vᵀ``, to 13 percent.

    Singular values from 1/1000 of the Frobenius norm up come out near one, smaller ones are
    raised about 1000 times. In bfloat16, whose products are several times as fast where a
    device has it; so is the result.

    Args:
        matrix: ``[L, R, C]``.
    """
    tall = matrix.shape[1] > matrix.shape[2]
    x = (matrix.mT if tall else matrix).bfloat16()
    x = x / _norm(x)
    for a, b, c in SCHEDULE:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def polar_factor_by_gram(matrix: Tensor, late: torch.dtype | None = None) -> Tensor:
    """:func:`polar_factor` in the matrix's own precision, at fewer operations.

    Every iterate is a polynomial of the Gram matrix times the input, so that only the first and
    the last product have the matrix's long side: 2 in place of 10. The Gram matrix squares
    singular values; single precision has room for that, half precision has not.

    Args:
        matrix: ``[L, R, C]``.
        late: precision of the last two steps, of the last product and of the result. bfloat16
            has room for the Gram matrix there: after three steps singular values are within a
            factor of ten.
    """
    tall = matrix.shape[1] > matrix.shape[2]
    x = matrix.mT if tall else matrix
    x = x / _norm(x)
    gram = matmul(x, x.mT)
    (product,) = _iterate([gram], [_identity(gram)], SCHEDULE, late)
    x = matmul(product, x.to(product.dtype))
    return x.mT if tall else x


def orthogonalizers(
    grams: list[Tensor], share: float, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Matrices M that move X towards its polar factor P and keep its norm.

    ``M X = c (share · P + (1 − share) · X)``, where P is scaled to the Frobenius norm of X and c
    makes that norm the one of ``M X`` too. With ``X = |X| x`` and ``P = |X| p x``, p the polynomial
    of the iteration and ``|p x| = 1``, M is ``c (share · p + (1 − share) · I)``, and
    ``1/c² = share² + (1 − share)² + 2 share (1 − share) ⟨p x, x⟩``.

    Three steps of the iteration are enough where the entries of X are of one size, as those of an
    Adam step are. The singular values of such X lie within one or two decades.

    Args:
        grams: ``X Xᵀ``, each ``[L, R, R]``, X ``[L, R, C]`` with ``R ≤ C``; of one device and
            dtype, so that pointwise work goes together.
        dtype: of the iteration, by default that of the matrices. bfloat16 tells singular values
            down to a twentieth of their root mean square apart, which is as much as such a short
            iteration makes of them.
    """
    tiny = torch.finfo(grams[0].dtype).tiny ** 0.5
    identities = [_identity(gram) for gram in grams]
    traces = torch._foreach_add(_inner(grams, identities), tiny)
    grams = [gram / trace for gram, trace in zip(grams, traces, strict=True)]  # |X| is one now
    products = _iterate(_to(grams, dtype), _to(identities, dtype), (QUINTIC,) * 3)
    products = _to(products, grams[0].dtype)
    turned = _products(products, grams)
    norms = torch._foreach_sqrt(torch._foreach_add(_inner(turned, products), tiny))
    # cosine of the angle between X and its polar factor
    cosines = torch._foreach_div(_inner(turned, identities), norms)
    mixed = torch._foreach_mul(cosines, 2 * share * (1 - share))
    mixed = torch._foreach_sqrt(torch._foreach_add(mixed, share**2 + (1 - share) ** 2))  # 1 / c
    to_polar = torch._foreach_reciprocal(torch._foreach_mul(norms, mixed))
    kept = torch._foreach_reciprocal(mixed)
    shares = torch._foreach_mul(to_polar, share), torch._foreach_mul(kept, 1 - share)
    parts = [
        [matrix * own for matrix, own in zip(matrices, each, strict=True)]
        for matrices, each in zip((products, identities), shares, strict=True)
    ]
    return list(torch._foreach_add(*parts))


def _to(matrices: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    return matrices if dtype is None else [matrix.to(dtype) for matrix in matrices]


def _inner(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Sums of the products of entries, each ``[L, 1, 1]``. With the identity it is the trace,
    which inductor does not compile from ``diagonal`` of a product."""
    return [p.sum((1, 2), keepdim=True) for p in torch._foreach_mul(first, second)]


def _identity(gram: Tensor) -> Tensor:
    """As many as there are matrices: pointwise calls on lists take equal shapes together."""
    one = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return one.repeat(gram.shape[0], 1, 1) if gram.shape[0] > 1 else one.unsqueeze(0)


def _iterate(
    grams: list[Tensor],
    identities: list[Tensor],
    coefficients: Sequence[tuple[float, float, float]],
    late: torch.dtype | None = None,
) -> list[Tensor]:
    """The products p of the polynomials of ``G = X Xᵀ`` that make ``p X`` the polar factor of X.

    Args:
        late: precision of the last two polynomials.
    """
    products: list[Tensor] = []
    for index, (a, b, c) in enumerate(coefficients):
        if index == len(coefficients) - 2:
            grams, products, identities = (_to(m, late) for m in (grams, products, identities))
        # p = a I + G (b I + c G);  x ← p x;  G ← p G p
        scaled = torch._foreach_mul(identities, b)
        inner = torch._foreach_add(scaled, grams, alpha=c)
        factors = list(torch._foreach_add(_products(grams, inner), identities, alpha=a))
        products = _products(factors, products) if products else factors
        if index + 1 < len(coefficients):
            grams = _products(_products(factors, grams), factors)
    return products


def _products(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [matmul(one, other) for one, other in zip(first, second, strict=True)]


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm with the margin, positive."""
    norm = torch.linalg.matrix_norm(
        x, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return (norm * SAFETY + torch.finfo(norm.dtype).tiny ** 0.5).to(x.dtype)
