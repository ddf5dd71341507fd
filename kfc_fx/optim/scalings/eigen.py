""" "eigen": EKFAC, a second moment in the eigenbasis of Ω ⊗ Γ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kfc_fx.codegen.scalings import eigen
from kfc_fx.codegen.scalings.rules import ScalingRule
from kfc_fx.optim.checks import DECAY, FLAG, POSITIVE
from kfc_fx.optim.scalings.scaling import VectorScaling
from kfc_fx.plan.forms import FactorForms, InputFactorOption, cut, factor_forms
from kfc_fx.plan.spec import BlockSpec


@dataclass(frozen=True, kw_only=True)
class Eigen(VectorScaling):
    """The inverse of a second moment in the eigenbasis (George et al. 2018), ``scaling="eigen"``.

    Args:
        momentum: μ of ``p ← μ p + v``.
        nesterov: step by ``μ p + v`` in place of p. Off, as published.
        second_moment_decay: decay of the second moment.
        damping: λ beside the second moment, and of ν.
        clip: C, the bound on ν = vᵀFv + λ vᵀv of a step; None for no bound.
        clip_by: ``"factors"`` computes ν from the Kronecker factors, which costs nothing;
            ``"exact"`` from Fisher-vector products through the model.
        clip_samples: examples of the batch that the exact Fisher matrix is taken of; None for all.

    Raises:
        OptionError: a field is of the wrong type or out of range.
    """

    name: ClassVar[str] = "eigen"
    generator: ClassVar[ScalingRule] = eigen

    momentum: Annotated[float, DECAY] = 0.7
    nesterov: Annotated[bool, FLAG] = False
    second_moment_decay: Annotated[float, DECAY] = 0.95
    damping: Annotated[float, POSITIVE] = 1e-2

    def forms(
        self, block: BlockSpec, input_factor: InputFactorOption, basis_limit: int
    ) -> FactorForms:
        """Factors whose side exceeds the limit of an eigenbasis are cut."""
        return cut(block, factor_forms(block, input_factor), basis_limit)

    def numbers(self) -> dict[str, float]:
        names = ("momentum", "second_moment_decay", "damping")
        return {name: getattr(self, name) for name in names}
