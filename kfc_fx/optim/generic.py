"""How generic parameters, those without a block, are updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from kfc_fx.codegen.spec import GenericRule
from kfc_fx.errors import OptionError
from kfc_fx.optim.checks import BETAS, DECAY, NOT_NEGATIVE, Checked, either


@dataclass(frozen=True, kw_only=True)
class GenericAdamW(Checked):
    """AdamW, as ``torch.optim.AdamW`` steps, ``generic="adamw"``.

    Args:
        lr_ratio: learning rate of generic parameters relative to their group's. None is 1, and 0.1
            beside "spectral", whose rates are larger than AdamW's.
        betas: decays of the first and the second moment, torch's defaults.

    Raises:
        OptionError: a field is of the wrong type or out of range.
    """

    rule: ClassVar[GenericRule] = "adamw"

    lr_ratio: Annotated[float | None, either(NOT_NEGATIVE, None)] = None
    betas: Annotated[tuple[float, float], BETAS] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class GenericSGD(Checked):
    """SGD with momentum, as ``torch.optim.SGD`` steps, ``generic="sgd"``.

    Args:
        lr_ratio: as for :class:`GenericAdamW`.
        momentum: decay of ``p ← momentum p + ∇``. It is larger than that of blocks that step by a
            vector, whose steps are larger.

    Raises:
        OptionError: a field is of the wrong type or out of range.
    """

    rule: ClassVar[GenericRule] = "sgd"

    lr_ratio: Annotated[float | None, either(NOT_NEGATIVE, None)] = None
    momentum: Annotated[float, DECAY] = 0.9

    @property
    def betas(self) -> tuple[float, float]:
        """The momentum, and no second moment."""
        return self.momentum, 0.0


Generic = GenericAdamW | GenericSGD
GENERIC: dict[str, type[Generic]] = {kind.rule: kind for kind in (GenericAdamW, GenericSGD)}


def generic_of(given: object) -> Generic:
    """A rule from its name, which stands for its defaults, or from the value itself.

    Raises:
        OptionError: it is neither.
    """
    if isinstance(given, GenericAdamW | GenericSGD):
        return given
    if isinstance(given, str) and given in GENERIC:
        return GENERIC[given]()
    names = ", ".join(map(repr, GENERIC))
    values = ", ".join(f"kfc_fx.{kind.__name__}(...)" for kind in GENERIC.values())
    raise OptionError(f"generic must be one of {names}, or one of {values}; got {given!r}")
