""" "spectral": steepest descent under the spectral norm in the metric of Ω."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kfc_fx.codegen.scalings import spectral
from kfc_fx.codegen.scalings.rules import ScalingRule
from kfc_fx.codegen.spec import GenericRule
from kfc_fx.optim.checks import COUNT, DECAY, FLAG, POSITIVE
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.plan.forms import FactorForms, InputFactorOption, factor_forms, takes_matrix_step
from kfc_fx.plan.spec import BlockSpec


@dataclass(frozen=True, kw_only=True)
class Spectral(Scaling):
    """Steepest descent under the spectral norm in the metric of Ω, ``scaling="spectral"``.

    It needs no Fisher pass and keeps no Γ. It is for matrices: the tables of embeddings, the
    parameters of norms and sides beyond the limit of a dense factor are generic.

    Args:
        momentum: decay of the moving average of the gradient. The polar factor has no magnitude,
            so that a long average pays.
        nesterov: let the momentum take Nesterov's step ahead, ``β m + (1 − β) g``. On: it costs
            nothing.
        damping: γ beside Ω, relative to its mean eigenvalue. It is large, since all directions of
            a step have one length: those of small eigenvalues would be noise.
        split: matrices of equal height that the rows of a matrix are, each of which has a polar
            factor of its own: 3 for a layer that computes queries, keys and values at once.
        heads: those that the rows of each of these are again: of an attention layer the heads.
            Rows of one matrix stand next to each other.

    Raises:
        OptionError: a field is of the wrong type or out of range.
    """

    name: ClassVar[str] = "spectral"
    generator: ClassVar[ScalingRule] = spectral
    lr: ClassVar[float] = 0.07
    generic: ClassVar[GenericRule] = "adamw"
    generic_lr_ratio: ClassVar[float] = 0.1  # the rates of the scaling are larger than AdamW's
    scale_free: ClassVar[bool] = True  # there is no Γ

    momentum: Annotated[float, DECAY] = 0.95
    nesterov: Annotated[bool, FLAG] = True
    damping: Annotated[float, POSITIVE] = 0.3
    split: Annotated[int, COUNT] = 1
    heads: Annotated[int, COUNT] = 1

    def forms(
        self, block: BlockSpec, input_factor: InputFactorOption, basis_limit: int
    ) -> FactorForms | None:
        """No Γ, and nothing for blocks that are no matrices of moderate size."""
        if not takes_matrix_step(block):
            return None
        return FactorForms(factor_forms(block, input_factor).input, "absent")

    def numbers(self) -> dict[str, float]:
        return {"momentum": self.momentum, "damping": self.damping}
