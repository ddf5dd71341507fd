""" "inverse": the damped inverses of both factors, the algorithm that KFC was published with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kfc_fx.codegen.scalings import inverse
from kfc_fx.codegen.scalings.rules import ScalingRule
from kfc_fx.codegen.spec import Clip
from kfc_fx.errors import OptionError
from kfc_fx.optim.checks import COUNT, DECAY, FLAG, NOT_NEGATIVE, either
from kfc_fx.optim.scalings.scaling import VectorScaling


@dataclass(frozen=True, kw_only=True)
class Inverse(VectorScaling):
    """The damped inverses of both factors (KFC-pre, algorithm 1 of Grosse & Martens 2016),
    ``scaling="inverse"``.

    Args:
        momentum: μ of ``p ← μ p + v``.
        nesterov: step by ``μ p + v`` in place of p. Off, as published.
        damping: γ of factored Tikhonov damping, and λ of ν.
        clip: C, the bound on ν = vᵀFv + λ vᵀv of a step; None for no bound.
        clip_by: ``"factors"`` computes ν from the Kronecker factors, which costs nothing;
            ``"exact"`` from Fisher-vector products through the model.
        clip_samples: examples of the batch that the exact Fisher matrix is taken of, for ν, the
            quadratic model and the adapted damping; None for all.
        quadratic_model: take step size and momentum of every step from the exact quadratic model
            of the loss in place of ``lr``, ``momentum`` and ``clip`` (Martens & Grosse 2015,
            sections 6.4 and 7). It costs two forward-mode passes a step. ``lr`` is that of
            generic parameters then.
        adapt_damping: T₁, steps between adaptations of the damping to how well the quadratic
            model predicts the loss (there, section 6.5; 5 in the paper); None keeps the damping.
            It needs ``step(closure)``, and calls the closure once more at those steps, for the
            loss that the step has led to.

    Raises:
        OptionError: a field is of the wrong type or out of range, or ``nesterov`` is asked of
            the quadratic model, which chooses the momentum itself.
    """

    name: ClassVar[str] = "inverse"
    generator: ClassVar[ScalingRule] = inverse
    first_steps: ClassVar[int] = 20
    """Curvature grows fastest in the first steps: a stale inverse overshoots then, a stale basis
    only rotates."""

    momentum: Annotated[float, DECAY] = 0.7
    nesterov: Annotated[bool, FLAG] = False
    damping: Annotated[float, NOT_NEGATIVE] = 1e-2
    quadratic_model: Annotated[bool, FLAG] = False
    adapt_damping: Annotated[int | None, either(COUNT, None)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quadratic_model and self.nesterov:
            raise OptionError(
                "Inverse: nesterov=True does not go with quadratic_model=True, which takes the "
                "momentum of every step from the model"
            )

    def numbers(self) -> dict[str, float]:
        return {"momentum": self.momentum, "damping": self.damping}

    @property
    def clipping(self) -> Clip:
        """By the quadratic model, or as other vectors."""
        return "model" if self.quadratic_model else super().clipping

    @property
    def needs_inputs(self) -> bool:
        """Also where the damping is adapted."""
        return super().needs_inputs or self.adapt_damping is not None
