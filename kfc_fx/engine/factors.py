"""The factors of a block as a user sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.engine.state import entries_of
from kfc_fx.errors import KfcError
from kfc_fx.linalg.eigenbasis import from_basis


@dataclass(frozen=True)
class Factors:
    """Bias-corrected EMA of a block's factors.

    Either ``dense``, ``[groups, D, D]`` (``[groups, 1, D]`` of a diagonal factor), or ``channel``
    ``[groups, C, C]`` and ``offset`` ``[groups, K, K]`` with, for layers with bias, ``locations``
    (``|T|``); and ``output`` ``[groups, R, R]`` (``[groups, R, 1]``), None where the block's
    scaling needs no Γ. Of "adam" and "eigen" with equal intervals they are made from basis and
    eigenvalues, all there is of them between two statistics.
    """

    output: Tensor | None
    dense: Tensor | None = None
    channel: Tensor | None = None
    offset: Tensor | None = None
    locations: Tensor | None = None

    @property
    def omega(self) -> Tensor:
        """Input factor Ω ``[D, D]``, or ``[groups, D, D]`` of a grouped convolution.

        In the column order of ``weight.reshape(C_out, -1)``, then the bias. A separable factor
        is written out, ``Ω_C ⊗ Ω_Δ / tr Ω`` with the bias column apart; of a diagonal factor it
        is the diagonal, ``[D]``.
        """
        if self.dense is not None and self.dense.shape[1] != self.dense.shape[2]:
            return _squeezed(self.dense[:, 0])
        return _squeezed(self.dense if self.dense is not None else self._written_out())

    @property
    def gamma(self) -> Tensor:
        """Output factor Γ ``[R, R]``, or ``[groups, R, R]`` of a grouped convolution; of a
        diagonal factor its diagonal, ``[R]``.

        Raises:
            KfcError: the scaling of the block, "spectral", takes no output statistics.
        """
        if self.output is None:
            raise KfcError(
                "this block keeps no output factor Γ: its scaling needs the input factor alone"
            )
        if self.output.shape[1] != self.output.shape[2]:
            return _squeezed(self.output[:, :, 0])
        return _squeezed(self.output)

    def _written_out(self) -> Tensor:
        assert self.channel is not None
        assert self.offset is not None
        tiny = torch.finfo(self.channel.dtype).tiny ** 0.5
        trace = self.channel.diagonal(dim1=1, dim2=2).sum(1).clamp(min=tiny)
        pairs = zip(self.channel, self.offset, trace, strict=True)
        blocks = [torch.kron(channel, offset) / total for channel, offset, total in pairs]
        if self.locations is not None:
            corners = self.locations.reshape(-1, 1, 1)
            blocks = [torch.block_diag(b, c) for b, c in zip(blocks, corners, strict=True)]
        return torch.stack(blocks)


def factors_of(
    spec: UpdateSpec, stack: StackSpec, state: Mapping[str, Tensor], block: str
) -> Factors:
    """Bias-corrected factors of a block, from the state of its stack."""
    span = stack.spans[block]

    def own(name: str) -> Tensor:
        return entries_of(state[name], stack, span)

    def corrected(name: str) -> Tensor | None:
        if name in spec.factors_in_basis_of(stack):
            value = from_basis(own(f"q_{name}"), own(f"eigenvalues_{name}"))
        elif name in state:
            value = own(name)
        else:
            return None
        parts = stack.parts.get(name, 1)
        corner = own("locations") if name == "omega" and stack.has_bias_apart else None
        return (joined(value, parts, corner) if parts > 1 else value) / mass

    mass = own("mass").clamp(min=1e-12)
    return Factors(
        output=corrected("gamma"),
        dense=corrected("omega"),
        channel=corrected("channel"),
        offset=corrected("offset"),
        locations=corrected("locations"),
    )


def _squeezed(stacked: Tensor) -> Tensor:
    return stacked[0] if stacked.shape[0] == 1 else stacked


def joined(parts: Tensor, count: int, corners: Tensor | None) -> Tensor:
    """Factors ``[groups, D, D]`` from their diagonal blocks ``[groups · count, D/count, D/count]``,
    zero beside these; ``corners`` ``[groups, 1, 1]`` is the entry of the bias column."""
    groups = parts.unflatten(0, (-1, count))
    ends = [[]] * len(groups) if corners is None else [[corner] for corner in corners]
    return torch.stack(
        [torch.block_diag(*own, *end) for own, end in zip(groups, ends, strict=True)]
    )
