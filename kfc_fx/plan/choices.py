"""What the options choose for a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kfc_fx.plan.forms import FactorForms

Scaling = Literal["adam", "spectral", "eigen", "inverse"]
"""How a gradient is scaled by the factors of its block."""


@dataclass(frozen=True)
class BlockChoice:
    """What the options say of a block."""

    scaling: Scaling
    forms: FactorForms
