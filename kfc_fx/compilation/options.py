"""How a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from kfc_fx.plan.sharing import SharingOption
from kfc_fx.statistics.likelihood import Likelihood


@dataclass(frozen=True)
class CompileOptions:
    """The options of :func:`kfc_fx.compile`, checked."""

    likelihood: Likelihood
    backend: str
    strict: bool
    norm_layers: bool
    weight_sharing: SharingOption
