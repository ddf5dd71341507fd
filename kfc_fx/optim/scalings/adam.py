""" "adam": Adam in the eigenbasis of Ω ⊗ Γ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kfc_fx.codegen.scalings import adam
from kfc_fx.codegen.scalings.rules import ScalingRule
from kfc_fx.codegen.spec import GenericRule
from kfc_fx.errors import OptionError
from kfc_fx.optim.checks import BETAS, COUNT, FLAG, POSITIVE, SHARE
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.plan.forms import FactorForms, InputFactorOption, cut, factor_forms
from kfc_fx.plan.spec import BlockSpec


@dataclass(frozen=True, kw_only=True)
class Adam(Scaling):
    """Adam in the eigenbasis of Ω ⊗ Γ, ``scaling="adam"``: the default, which needs no tuning.

    Args:
        betas: decays of the first and the second moment in the basis. The second moment is young,
            since it turns with the basis only approximately.
        eps: ε beside the root of the second moment. The scaling has no other damping.
        nesterov: let the first moment take Nesterov's step ahead, ``β₁ m + (1 − β₁) g`` (Dozat
            2016). On: it costs nothing.
        orthogonalize: how far the scaled gradient of a matrix, ``m̂ / (sqrt(v̂) + ε)``, moves from
            itself (0) to its polar factor (1), the nearest semi-orthogonal matrix, which Muon
            takes of the momentum; the Frobenius norm stays. 0.7 is between the two: the polar
            factor alone forgets what the second moment says.
        split: matrices of equal height that the rows of a matrix are, each of which has a polar
            factor of its own: 3 for a layer that computes queries, keys and values at once.
        heads: those that the rows of each of these are again: of an attention layer the heads.
            Rows of one matrix stand next to each other.

    Raises:
        OptionError: a field is of the wrong type or out of range, or ``split`` or ``heads`` are
            given without ``orthogonalize``.
    """

    name: ClassVar[str] = "adam"
    generator: ClassVar[ScalingRule] = adam
    lr: ClassVar[float] = 0.01
    generic: ClassVar[GenericRule] = "adamw"
    scale_free: ClassVar[bool] = True  # eigenvectors of Γ alone count

    betas: Annotated[tuple[float, float], BETAS] = (0.9, 0.95)
    eps: Annotated[float, POSITIVE] = 1e-8
    nesterov: Annotated[bool, FLAG] = True
    orthogonalize: Annotated[float, SHARE] = 0.7
    split: Annotated[int, COUNT] = 1
    heads: Annotated[int, COUNT] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_parts > 1 and not self.orthogonalizes:
            raise OptionError("split and heads part what is orthogonalized: orthogonalize is 0")

    def forms(
        self, block: BlockSpec, input_factor: InputFactorOption, basis_limit: int
    ) -> FactorForms:
        """Factors whose side exceeds the limit of an eigenbasis are cut."""
        return cut(block, factor_forms(block, input_factor), basis_limit)

    def numbers(self) -> dict[str, float]:
        momentum, second_moment_decay = self.betas
        return {
            "momentum": momentum,
            "second_moment_decay": second_moment_decay,
            "eps": self.eps,
            "orthogonalize": self.orthogonalize,
        }
