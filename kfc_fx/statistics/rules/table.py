"""The rule of each kind of layer, and the rule as the options of a call in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from kfc_fx.plan.forms import FactorForms
from kfc_fx.plan.spec import BlockSpec, SiteSpec
from kfc_fx.statistics.rules.batched_linear import BatchedLinearRule
from kfc_fx.statistics.rules.matrices import (
    ConvRule,
    ConvTransposeRule,
    EmbeddingRule,
    EmissionRule,
    LinearRule,
)
from kfc_fx.statistics.rules.scale_shift import ScaleShiftRule

RULES: dict[str, type[EmissionRule]] = {
    "linear": LinearRule,
    "batched_linear": BatchedLinearRule,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), ConvRule),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ConvTransposeRule
    ),
    "embedding": EmbeddingRule,
    "scale_shift": ScaleShiftRule,
}
"""The rule of each kind in ``plan.kinds.KINDS``."""


def rule(kind: str, options: Mapping[str, Any]) -> EmissionRule:
    """The rule of a kind, from the options of a call."""
    return RULES[kind](**options)


def options_of(block: BlockSpec, site: SiteSpec, forms: FactorForms) -> dict[str, Any]:
    """The options of the call at a site: the fields of its rule that are not the defaults."""
    own = RULES[site.kind].of(block, site, forms)
    values = {f.name: (getattr(own, f.name), f.default) for f in fields(own)}  # type: ignore[arg-type]
    return {
        name: value
        for name, (value, default) in values.items()
        if default is MISSING or value != default
    }
