"""Statistics of a scale and shift, ``y = w ⊙ x̂ + b``: the affine part of a norm layer.

    F_c = (1/N) Σ_n u_n u_nᵀ,    u_n = (Σ_t g_nt x̂_nt, Σ_t g_nt)

is per channel the exact Fisher matrix of ``(w, b)``; x̂ is computed again from the layer's input
(``(y − b) / w`` would fail at ``w = 0``, where residual branches start).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.plan.forms import FactorForms
from kfc_fx.plan.spec import BlockSpec, SiteSpec
from kfc_fx.statistics.rules.matrices import examples_first
from kfc_fx.statistics.share import BatchShare, scaled


@dataclass(frozen=True)
class ScaleShiftRule:
    """One kind of norm. ``shape`` is that of the weight, ``groups`` and ``eps`` the norm's own.

    A batch norm in evaluation mode reads its running mean and variance besides. Examples are
    along the first dimension; along ``batch_dim``, if the channels are last. The block is
    ``F_c ⊗ 1``, so that its Γ counts rows.
    """

    norm: str
    shape: tuple[int, ...]
    bias: bool
    groups: int = 1
    eps: float | None = None
    batch_dim: int = 0

    @classmethod
    def of(cls, block: BlockSpec, site: SiteSpec, _: FactorForms) -> Self:
        """See :class:`~kfc_fx.statistics.rules.matrices.EmissionRule`."""
        assert site.norm is not None
        norm, bias = site.norm, block.bias is not None
        batch_dim = 0 if norm.norm in ("batch", "group") else block.batch_dim
        return cls(norm.norm, block.weight_shape, bias, norm.groups, norm.eps, batch_dim)

    def statistics(
        self, share: BatchShare, x: Tensor, g: Tensor, *running: Tensor
    ) -> tuple[Tensor, ...]:
        """``[C, 2, 2]``, or ``[C, 1, 1]`` without a bias, and ``[C, 1, 1]``."""
        dtype, scale = statistic_dtype(x), 1.0
        x, g = (examples_first(t, self.batch_dim, len(self.shape)) for t in (x, g))
        if x.dim() == g.dim() and len(x) == len(g):  # else one x is broadcast over examples
            (x, _), (g, scale) = share.cut(x), share.cut(g)
        channels = prod(self.shape)
        g = self._by_channel(g.to(dtype))
        normalised = self._by_channel(self._normalised(x.to(dtype), x.dtype, running))
        sums = [(g * normalised).sum(1)] + ([g.sum(1)] if self.bias else [])
        u = torch.stack(sums, 2).transpose(0, 1)  # [C, N, 2]
        return scaled((u.mT @ u, g.new_full((channels, 1, 1), g.numel() // channels)), scale)

    def _by_channel(self, x: Tensor) -> Tensor:
        """``[N, T, C]``."""
        if self.norm in ("batch", "group"):
            return x.flatten(2).mT if x.dim() > 2 else x.unsqueeze(1)
        locations = prod(x.shape[1 : x.dim() - len(self.shape)])
        batch = len(x) if x.dim() > len(self.shape) else 1
        return x.reshape(batch, locations, prod(self.shape))

    def _normalised(self, x: Tensor, dtype: torch.dtype, running: tuple[Tensor, ...]) -> Tensor:
        if self.norm == "none":
            return x.expand(torch.broadcast_shapes(x.shape, self.shape))
        if self.norm == "batch":
            mean, variance = (t.to(x.dtype) for t in running) if running else (None, None)
            return F.batch_norm(x, mean, variance, training=not running, eps=self.eps or 0.0)
        if self.norm == "group":
            return F.group_norm(x, self.groups, eps=self.eps or 0.0)
        if self.norm == "layer":
            return F.layer_norm(x, self.shape, eps=self.eps or 0.0)
        eps = torch.finfo(dtype).eps if self.eps is None else self.eps
        return F.rms_norm(x, self.shape, eps=eps)
