"""Options of the optimizer, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from kfc_fx.codegen.options import Clip, GenericRule, Scaling
from kfc_fx.curvature.recorder import Fisher
from kfc_fx.errors import OptionError
from kfc_fx.plan.forms import InputFactorOption, check_input_factor


@dataclass(frozen=True)
class KFCOptions:
    """Everything of :class:`kfc_fx.KFC` that is not per parameter group."""

    scaling: Scaling
    momentum: float
    damping: float
    ema_decay: float
    factor_interval: int
    factor_samples: int | None
    inverse_interval: int
    clip: float | None
    clip_by: Clip
    clip_samples: int | None
    average: float | None
    fisher: Fisher
    input_factor: InputFactorOption
    second_moment_decay: float
    eps: float
    generic: GenericRule

    def __post_init__(self) -> None:
        for name, known in (
            ("scaling", get_args(Scaling)),
            ("fisher", get_args(Fisher)),
            ("generic", get_args(GenericRule)),
            ("clip_by", ("factors", "exact")),
        ):
            _one_of(name, getattr(self, name), known)
        check_input_factor(self.input_factor)
        for name in ("momentum", "ema_decay", "second_moment_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise OptionError(f"{name} must be in [0, 1), got {value!r}")
        for name in ("factor_interval", "inverse_interval"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise OptionError(
                    f"{name} must be a whole number of steps, at least 1; got {value!r}"
                )
        if not (self.damping > 0 or (self.damping == 0 and self.scaling == "inverse")):
            raise OptionError(f"damping must be positive, got {self.damping!r}")
        for name in ("clip", "average", "clip_samples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name} must be positive or None, got {value!r}")
        samples = self.factor_samples
        if samples is not None and not (isinstance(samples, int) and samples >= 1):
            raise OptionError(
                f"factor_samples must be a whole number of examples, at least 1, or None; "
                f"got {samples!r}"
            )
        if not self.eps > 0:
            raise OptionError(f"eps must be positive, got {self.eps!r}")

    @property
    def clipping(self) -> Clip:
        """What ν is computed from; "none" where nothing is clipped."""
        return self.clip_by if self.scaling == "inverse" and self.clip is not None else "none"


def check_group(group: Mapping[str, Any]) -> None:
    """Raise :class:`OptionError` for a parameter group with a rate below zero."""
    for name in ("lr", "weight_decay"):
        if not float(group[name]) >= 0:
            raise OptionError(f"{name} must not be negative, got {group[name]!r}")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name} must be one of {', '.join(known)}; got {value!r}")
