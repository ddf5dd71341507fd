"""Products with bases that are given by their parts. The generated update calls these.

A factor that is cut has a basis ``Q`` of diagonal blocks, ``[L · parts, D / parts, D / parts]``. A
separable input factor has the basis ``Q_Δ ⊗ Q_C``. The bias column of a matrix is the last one. A
basis without an entry for the bias column leaves the column as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_matmul import matmul
from kfc_fx.linalg.half import HALF, rounded, widened

Turn = tuple[Tensor, Tensor]
"""The old basis of a factor and the new one."""


def rotate_rows(basis: Tensor, matrix: Tensor) -> Tensor:
    """``Q M``.

    Args:
        basis: Q, ``[L, R, R]``, or its blocks ``[L · parts, R / parts, R / parts]``.
        matrix: M, ``[L, R, C]``.
    """
    parts = len(basis) // len(matrix)
    if parts == 1:
        return matmul(basis, matrix)
    turned = matmul(basis, matrix.unflatten(1, (parts, -1)).flatten(0, 1))
    return turned.unflatten(0, (-1, parts)).flatten(1, 2)


def rotate_columns(matrix: Tensor, basis: Tensor) -> Tensor:
    """``M Q``.

    Args:
        matrix: M, ``[L, R, C]``.
        basis: Q, ``[L, C, C]``, or its blocks ``[L · parts, side, side]``, where ``parts · side``
            is C, or C − 1 if the last column is that of the bias.
    """
    parts, side = len(basis) // len(matrix), basis.shape[1]
    if parts == 1 and side == matrix.shape[2]:
        return matmul(matrix, basis)
    main = matrix[:, :, : parts * side].unflatten(2, (parts, side))
    turned = matmul(main.transpose(1, 2).flatten(0, 1), basis)
    turned = turned.unflatten(0, (-1, parts)).transpose(1, 2).flatten(2)
    return _with_bias(turned, matrix)


def rotate_product(
    matrix: Tensor, channel: Tensor, offset: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``M (Q_Δ ⊗ Q_C)``, columns offset-major.

    Args:
        matrix: M, ``[L, R, K · C]`` or, with a bias column, ``[L, R, K · C + 1]``.
        channel: Q_C, ``[L, C, C]``.
        offset: Q_Δ, ``[L, K, K]``.
        bias: what the bias column is multiplied by, ``[L, 1, 1]``; by default it stays.
    """
    rows, offsets, channels = matrix.shape[1], offset.shape[1], channel.shape[1]
    main = matrix[:, :, : offsets * channels].unflatten(2, (offsets, channels))
    # The offsets are turned in many tiny products, whose basis is cheap to broadcast; the
    # channels in one large product, because broadcasting their basis would copy it.
    turned = matmul((offset.mT.unsqueeze(1) @ main).flatten(1, 2), channel)
    return _with_bias(turned.unflatten(1, (rows, offsets)).flatten(2), matrix, bias)


def turn_moments(
    m: Tensor,
    v: Tensor,
    *,
    gamma: Turn | None = None,
    omega: Turn | None = None,
    channel: Turn | None = None,
    offset: Turn | None = None,
) -> tuple[Tensor, Tensor]:
    """Both moments in a new basis, with ``R = Qᵀ_old Q_new`` of each factor.

    The first moment turns exactly, ``R_Γᵀ m R_Ω``: it is as if it were kept in the original
    coordinates. The second takes ``(R_Γ∘R_Γ)ᵀ v (R_Ω∘R_Ω)``, exact where the gradient's coordinates
    are uncorrelated; left alone it would belong to other directions wherever eigenvalues trade
    places.

    Args:
        m: ``[L, R, C]``, or in bfloat16, as what is returned is then.
        v: the same.
        gamma: bases of the output factor; of a diagonal factor none, whose basis is I.
        omega: bases of the input factor; of a separable one ``channel`` and ``offset``.
    """
    turns = _turns(gamma, omega, channel, offset)
    return _turned(m, turns), _turned(v, [_squared(turn) for turn in turns])


def turn_second_moment(
    v: Tensor,
    *,
    gamma: Turn | None = None,
    omega: Turn | None = None,
    channel: Turn | None = None,
    offset: Turn | None = None,
) -> Tensor:
    """The second moment as in :func:`turn_moments`, where there is no first one."""
    turns = _turns(gamma, omega, channel, offset)
    return _turned(v, [_squared(turn) for turn in turns])


def _turns(*bases: Turn | None) -> list[Tensor | None]:
    return [matmul(pair[0].mT, pair[1]) if pair else None for pair in bases]


def _squared(turn: Tensor | None) -> Tensor | None:
    return None if turn is None else turn.square()


def _turned(kept: Tensor, turns: list[Tensor | None]) -> Tensor:
    gamma, omega, channel, offset = turns
    (moment,) = widened([kept])
    if gamma is not None:
        moment = rotate_rows(gamma.mT, moment)
    if omega is not None:
        moment = rotate_columns(moment, omega)
    if channel is not None and offset is not None:
        moment = rotate_product(moment, channel, offset)
    return rounded(moment) if kept.dtype == HALF else moment


def _with_bias(turned: Tensor, matrix: Tensor, weight: Tensor | None = None) -> Tensor:
    """``turned`` and the columns of ``matrix`` that it lacks, times their weight."""
    width = turned.shape[2]
    if width == matrix.shape[2]:
        return turned
    last = matrix[:, :, width:]
    return torch.cat([turned, last if weight is None else last * weight], 2)
