"""The work of the layers of a captured graph, counted from shapes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from kfc_fx.plan.spec import SiteSpec

PRODUCT = 2
"""Operations of a multiply-add."""


def layer_flops(sites: Iterable[SiteSpec], model: nn.Module) -> int:
    """Operations of one example in the products of layers with their weights, in the forward pass
    and for the gradients: those of inputs, and those of the weights that are trained.

    Sizes of maps and texts are those of the capture. What is no layer of the plan, such as the
    products within attention, counts for nothing. The gradient of the model's own input, which
    nobody asks for, is counted.
    """
    found = 0.0
    for site in sites:
        if not site.layer.is_matrix:
            continue
        weight = model.get_parameter(site.weight)
        share = (site.rows[1] - site.rows[0]) / len(weight) if site.rows else 1.0
        passes = 3 if weight.requires_grad else 2
        found += passes * PRODUCT * max(site.locations, 1) * weight.numel() * share
    return int(found)
