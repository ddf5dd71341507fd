"""The options of an optimizer together: what follows from several of them, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

import torch

from kfc_fx.codegen.spec import Clip
from kfc_fx.errors import OptionError
from kfc_fx.optim.block_options import BlockOptions, patterns_of
from kfc_fx.optim.checks import COUNT, FLAG, INTEGER, POSITIVE, Check, Checked, either, one_of
from kfc_fx.optim.generic import Generic, generic_of
from kfc_fx.optim.scalings.inverse import Inverse
from kfc_fx.optim.scalings.scaling import Scaling, VectorScaling
from kfc_fx.optim.scalings.table import scaling_of
from kfc_fx.optim.statistics import Statistics

SHARED = ("clip", "clip_by", "clip_samples", "quadratic_model", "adapt_damping")
"""Options on which all scalings that step by a vector agree: ν and the quadratic model are of the
step of all their blocks together."""
Distribute = Literal["refresh", "update", "none"]
"""What of a step the ranks share among them."""
STATE_DTYPE = Check(
    lambda value: value is None or value in (torch.float32, torch.bfloat16),
    "None, torch.float32 or torch.bfloat16",
)
STATISTICS = Check(lambda value: isinstance(value, Statistics), "a kfc_fx.Statistics(...)")


@dataclass(frozen=True)
class KFCOptions(Checked):
    """Everything of :class:`kfc_fx.KFC` that is not per parameter group, under the names there.

    Names of scalings and of generic rules are replaced by the values that they stand for.

    Raises:
        OptionError: an option is of the wrong type or out of range, or does not go with another.
    """

    scaling: Any
    blocks: Any
    generic: Any
    statistics: Annotated[Statistics, STATISTICS]
    warmup: Annotated[int | None, either(COUNT, None)]
    max_block_norm: Annotated[float | None, either(POSITIVE, None)]
    cautious_decay: Annotated[bool, FLAG]
    average: Annotated[float | None, either(POSITIVE, None)]
    master_weights: Annotated[bool, FLAG]
    state_dtype: Annotated[torch.dtype | None, STATE_DTYPE]
    compile_update: Annotated[bool, FLAG]
    cuda_graph: Annotated[bool | None, either(FLAG, None)]
    maximize: Annotated[bool, FLAG]
    seed: Annotated[int | None, either(INTEGER, None)]
    distribute: Annotated[Distribute, one_of(*get_args(Distribute))]
    compare_every: Annotated[int | None, either(COUNT, None)]

    def __post_init__(self) -> None:
        super().__post_init__()
        scaling = scaling_of("scaling", self.scaling)
        generic = generic_of(scaling.generic if self.generic is None else self.generic)
        object.__setattr__(self, "scaling", scaling)
        object.__setattr__(self, "blocks", patterns_of(self.blocks))
        object.__setattr__(self, "generic", generic)
        self._check_exact_fisher()
        if self.warmup is not None and self.clipping == "model":
            raise OptionError(
                "warmup has nothing to change with quadratic_model, which chooses the size of "
                "every step: leave one of them out"
            )
        if self.max_block_norm is not None and (self.clipping == "model" or self.adapt_damping):
            raise OptionError(
                "max_block_norm changes the gradient of the quadratic model, by which "
                "quadratic_model and adapt_damping judge steps: leave one of them out"
            )
        _check_shared(self.vectors)

    @classmethod
    def title(cls) -> str:
        """Errors name these as options of the optimizer, without another name before."""
        return ""

    def _check_exact_fisher(self) -> None:
        for name in ("quadratic_model", "adapt_damping"):
            asked = [value for value in self.vectors if getattr(value, name, None)]
            others = [value.name for value in self.scalings if not isinstance(value, Inverse)]
            if asked and others:
                raise OptionError(
                    f"{name} needs scaling='inverse' for all blocks, and some take "
                    f"{' and '.join(others)}"
                )
        dampings = sorted({value.numbers()["damping"] for value in self._damped})
        if self.needs_inputs and len(dampings) > 1:
            raise OptionError(
                "clip_by='exact', quadratic_model and adapt_damping take one damping for all "
                f"blocks, and these scalings have {' and '.join(map(str, dampings))}"
            )

    # -- scalings ----------------------------------------------------------------------------

    @cached_property
    def by_block(self) -> BlockOptions:
        """The options of each block."""
        return BlockOptions(self.scaling, self.blocks, self.statistics)

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """Those that some block may take, the general one first."""
        return self.by_block.scalings

    @property
    def vectors(self) -> list[VectorScaling]:
        """The scalings that step by a vector."""
        return [value for value in self.scalings if isinstance(value, VectorScaling)]

    @property
    def scale_free(self) -> bool:
        """Whether no step depends on the scale of Γ."""
        return all(value.scale_free for value in self.scalings)

    @property
    def first_steps(self) -> int:
        """First steps at which statistics and a refresh are due whatever the intervals are."""
        return max(value.first_steps for value in self.scalings)

    # -- steps by a vector -------------------------------------------------------------------

    @property
    def bound(self) -> VectorScaling | None:
        """A scaling that has the options which all that step by a vector share."""
        return self.vectors[0] if self.vectors else None

    @property
    def clipping(self) -> Clip:
        """How steps by a vector are scaled: by the quadratic model, by what ν is computed from,
        or not."""
        return self.bound.clipping if self.bound else "none"

    @property
    def adapt_damping(self) -> int | None:
        """Steps between adaptations of the damping; None where it stays."""
        return getattr(self.bound, "adapt_damping", None)

    @property
    def needs_inputs(self) -> bool:
        """Whether the exact Fisher matrix is asked, which takes the inputs of the last batch."""
        return any(value.needs_inputs for value in self.scalings)

    @property
    def damping(self) -> float | None:
        """λ of ν: the damping of the scalings that step by a vector, "inverse" before others."""
        return self._damped[0].numbers()["damping"] if self._damped else None

    @property
    def _damped(self) -> list[VectorScaling]:
        vectors = self.vectors
        return [value for value in vectors if isinstance(value, Inverse)] or vectors

    # -- moments and rates -------------------------------------------------------------------

    @property
    def betas(self) -> tuple[float, float]:
        """What parameter groups have by default: the decays of the general scaling's moments; the
        second is that of generic parameters, where the scaling has none."""
        second = self.scaling.second_beta
        return self.scaling.first_beta, self.generic.betas[1] if second is None else second

    @property
    def generic_ratio(self) -> float:
        """Learning rate of generic parameters relative to their group's."""
        generic: Generic = self.generic
        return self.scaling.generic_lr_ratio if generic.lr_ratio is None else generic.lr_ratio


def by_name(options: KFCOptions) -> dict[str, Any]:
    """The options as arguments of :class:`kfc_fx.KFC`."""
    return {field.name: getattr(options, field.name) for field in fields(options)}


def _check_shared(vectors: list[VectorScaling]) -> None:
    for name in SHARED:
        found = {getattr(value, name, None) or None: value for value in vectors}
        if len(found) > 1:
            (one, of_one), (other, of_other) = list(found.items())[:2]
            raise OptionError(
                f"{name} is one for all blocks that step by a vector, and {type(of_one).__name__} "
                f"has {one!r}, {type(of_other).__name__} in blocks {other!r}: give both the same"
            )
