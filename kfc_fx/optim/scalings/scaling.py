"""What every scaling says of itself: the base of the values ``Adam``, ``Spectral`` and so on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from kfc_fx.codegen.scalings.rules import ScalingRule, steps_by_vector
from kfc_fx.codegen.spec import Clip, GenericRule
from kfc_fx.errors import OptionError
from kfc_fx.optim.checks import COUNT, POSITIVE, Checked, either, one_of
from kfc_fx.plan.forms import FactorForms, InputFactorOption, factor_forms, takes_matrix_step
from kfc_fx.plan.spec import BlockSpec

ClipBy = Literal["factors", "exact"]


@dataclass(frozen=True, kw_only=True)
class Scaling(Checked):
    """How a gradient is scaled by the factors of its block.

    A subclass has the options as fields, the facts below as class attributes, and
    :attr:`generator`, the module of :mod:`kfc_fx.codegen.scalings` that generates its code.
    """

    name: ClassVar[str]
    """What ``scaling=`` calls it, and the generated code."""
    generator: ClassVar[ScalingRule]
    lr: ClassVar[float]
    """Learning rate where none is given."""
    generic: ClassVar[GenericRule]
    """Rule for generic parameters where none is given."""
    generic_lr_ratio: ClassVar[float] = 1.0
    """Learning rate of generic parameters relative to that of blocks, where none is given."""
    scale_free: ClassVar[bool]
    """Whether a step does not depend on the scale of Γ."""
    first_steps: ClassVar[int] = 0
    """First steps at which statistics and a refresh are due whatever the intervals are."""

    def forms(
        self, block: BlockSpec, input_factor: InputFactorOption, basis_limit: int
    ) -> FactorForms | None:
        """The forms of a block's factors; None where the scaling does not fit the block, whose
        parameters are generic then."""
        return factor_forms(block, input_factor)

    @property
    def row_parts(self) -> int:
        """Matrices of equal height that the rows of a matrix are, each with a polar factor of its
        own."""
        return int(getattr(self, "split", 1) * getattr(self, "heads", 1))

    def check_rows(self, block: BlockSpec) -> None:
        """Raise :class:`OptionError` for a matrix whose rows are not :attr:`row_parts` equal
        parts."""
        parts, rows = self.row_parts, block.rows
        if parts > 1 and takes_matrix_step(block) and (rows % parts or rows == parts):
            raise OptionError(
                f"split * heads is {parts}, and block {block.name!r} has {rows} rows, which are "
                "not as many matrices of equal height: name the layers that are by blocks="
            )

    def numbers(self) -> dict[str, float]:
        """Options that the generated code takes as arguments, by their names there."""
        raise NotImplementedError

    @property
    def first_beta(self) -> float:
        """Decay of the momentum of blocks."""
        return self.numbers()["momentum"]

    @property
    def second_beta(self) -> float | None:
        """Decay of the second moment; None for a scaling that has none."""
        return self.numbers().get("second_moment_decay")

    @property
    def takes_nesterov(self) -> bool:
        """Whether the momentum of blocks takes Nesterov's step ahead."""
        return bool(getattr(self, "nesterov", False))

    @property
    def orthogonalizes(self) -> bool:
        """Whether the step of a matrix moves towards its polar factor."""
        return self.numbers().get("orthogonalize", 0) > 0

    @property
    def steps_by_vector(self) -> bool:
        """Whether a step is a momentum of vectors v, which ν may bound."""
        return steps_by_vector(self.generator)

    @property
    def clipping(self) -> Clip:
        """How a step by a vector is scaled."""
        return "none"

    @property
    def needs_inputs(self) -> bool:
        """Whether the exact Fisher matrix is asked, which takes the inputs of the last batch."""
        return self.clipping in ("exact", "model")


@dataclass(frozen=True, kw_only=True)
class VectorScaling(Scaling):
    """A scaling that adds to a momentum a vector v, which ν = vᵀFv + λ vᵀv bounds first."""

    scale_free: ClassVar[bool] = False
    lr: ClassVar[float] = 0.03
    generic: ClassVar[GenericRule] = "sgd"

    clip: Annotated[float | None, either(POSITIVE, None)] = 1e-2
    clip_by: Annotated[ClipBy, one_of(*get_args(ClipBy))] = "factors"
    clip_samples: Annotated[int | None, either(COUNT, None)] = None

    @property
    def clipping(self) -> Clip:
        return "none" if self.clip is None else self.clip_by
