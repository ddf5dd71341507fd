"""From the uses in all captured graphs to the plan, and the proof that it misses nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd

from kfc_fx.errors import CoverageError
from kfc_fx.plan.forms import too_wide
from kfc_fx.plan.sharing import SharingOption, check_patterns, sharing_of
from kfc_fx.plan.spec import (
    BlockSpec,
    CurvaturePlan,
    GenericSpec,
    GraphUses,
    ParameterSpec,
    SiteSpec,
    UnmatchedUse,
    block_name,
)

NOT_USED = "not used in any captured graph"
"""Reason of a parameter that the forward pass does not use."""

MOST_PROJECTIONS = 16
"""More parts than this of one weight are no projections, but an accident of how it is cut."""

Sites = Mapping[str, Sequence[SiteSpec]]
Unmatched = Mapping[str, Sequence[UnmatchedUse]]


def build_plan(
    parameters: Sequence[ParameterSpec],
    graphs: Sequence[GraphUses],
    *,
    norm_layers: bool = True,
    weight_sharing: SharingOption = "expand",
    batch_dim: int = 0,
) -> CurvaturePlan:
    """Decide for every parameter: block, generic or frozen; prove the result complete.

    Args:
        parameters: all parameters of the model, each once.
        graphs: the uses found in each captured graph.
        norm_layers: whether the scale and shift of a norm layer gets a block.
        weight_sharing: "expand" or "reduce" for linear blocks, or by glob on their names.
        batch_dim: dimension of the examples in the inputs of layers whose channels are last.

    Raises:
        OptionError: a pattern of ``weight_sharing`` matches no linear block.
        CoverageError: see :func:`prove_coverage`.
    """
    sites, unmatched = _by_parameter(graphs)
    specs = {spec.name: spec for spec in parameters}
    blocks: list[BlockSpec] = []
    reasons: dict[str, str] = {}
    for spec in parameters:
        if not spec.trainable or spec.name not in sites:
            continue
        reason = _refusal(spec, sites[spec.name], unmatched, norm_layers)
        if reason is None:
            uses = max(sum(s.weight == spec.name for s in graph.sites) for graph in graphs)
            block = replace(_block(spec, sites, unmatched, specs, uses), batch_dim=batch_dim)
            if block.layer.takes_sharing:
                block = replace(block, sharing=sharing_of(block.name, weight_sharing))
            reason = too_wide(block)
            blocks += [block] if reason is None else []
        if reason is not None:
            reasons[spec.name] = reason
    check_patterns(weight_sharing, [b.name for b in blocks if b.layer.takes_sharing])
    held = {name for block in blocks for name in block.parameters}
    generic = tuple(
        GenericSpec(s.name, s.shape, reasons.get(s.name) or _generic_reason(s, sites, unmatched))
        for s in parameters
        if s.trainable and s.name not in held
    )
    plan = CurvaturePlan(
        tuple(blocks), generic, tuple(s.name for s in parameters if not s.trainable)
    )
    prove_coverage(plan, parameters, graphs)
    return plan


def prove_coverage(
    plan: CurvaturePlan, parameters: Sequence[ParameterSpec], graphs: Sequence[GraphUses]
) -> None:
    """Check that the plan accounts for every use of every trainable parameter.

    Raises:
        CoverageError: a parameter is in no list or in two; a parameter of a block has a use
            that is not one of the block's sites. The message names the parameter and the use.
    """
    owner = {name: block for block in plan.blocks for name in block.parameters}
    in_blocks = [name for block in plan.blocks for name in block.parameters]
    listed = in_blocks + [g.name for g in plan.generic] + list(plan.frozen)
    for spec in parameters:
        times = listed.count(spec.name)
        if times != 1:
            raise CoverageError(f"parameter {spec.name} stands {times} times in the plan, not once")
    for uses in graphs:
        for use in uses.unmatched:
            if use.parameter in owner:
                raise CoverageError(
                    f"parameter {use.parameter} is in block {owner[use.parameter].name}, "
                    f"whose statistics miss its use by {use}"
                )
        for site in uses.sites:
            for name in (site.weight, site.bias):
                if name in owner and owner[name].weight != site.weight:
                    raise CoverageError(
                        f"parameter {name} is in block {owner[name].name}, whose statistics miss "
                        f"its use by node {site.node} at {site.location}"
                    )


def _by_parameter(
    graphs: Sequence[GraphUses],
) -> tuple[dict[str, list[SiteSpec]], dict[str, list[UnmatchedUse]]]:
    sites: dict[str, list[SiteSpec]] = defaultdict(list)
    unmatched: dict[str, list[UnmatchedUse]] = defaultdict(list)
    for uses in graphs:
        for site in uses.sites:
            sites[site.weight].append(site)
        for use in uses.unmatched:
            unmatched[use.parameter].append(use)
    return dict(sites), dict(unmatched)


def _refusal(
    spec: ParameterSpec, sites: Sequence[SiteSpec], unmatched: Unmatched, norm_layers: bool
) -> str | None:
    """Why a weight that has sites is generic all the same; None where it gets a block."""
    if spec.is_complex:
        return "its weight is complex, and factors are of real layers"
    if sites[0].layer.is_norm and not norm_layers:
        return "scale of a norm layer, and norm_layers=False"
    if spec.name in unmatched:
        return f"also used by {unmatched[spec.name][0]}"
    kinds = {site.kind: site for site in sites}
    if len(kinds) > 1:
        uses = " and ".join(f"{kind} at {site.location}" for kind, site in kinds.items())
        return f"tied between calls of different kinds: {uses}"
    if len({site.inputs_first for site in sites}) > 1:
        return "used by several calls, by some as its transpose"
    if len({site.bias for site in sites}) > 1:
        return "used by several calls with different biases"
    if _projections(spec, sites) > MOST_PROJECTIONS:
        return f"its rows are used in more than {MOST_PROJECTIONS} parts"
    if len({(site.geometry.kernel_size, site.geometry.groups) for site in sites}) > 1:
        return "used by several calls with different groups"
    return None


def _block(
    spec: ParameterSpec,
    sites: Sites,
    unmatched: Unmatched,
    specs: Mapping[str, ParameterSpec],
    uses: int,
) -> BlockSpec:
    own = sites[spec.name]
    bias = own[0].bias
    if bias is not None:
        strangers = [
            s for w, group in sites.items() if w != spec.name for s in group if s.bias == bias
        ]
        if strangers or bias in unmatched or not specs[bias].trainable:
            bias = None
    return BlockSpec(
        name=block_name(spec.name),
        kind=own[0].kind,
        weight=spec.name,
        bias=bias,
        weight_shape=spec.shape,
        geometry=own[0].geometry,
        uses=uses,
        inputs_first=own[0].inputs_first,
        projections=_projections(spec, own),
        locations=own[0].locations,
        bias_shape=() if bias is None else specs[bias].shape,
    )


def _projections(spec: ParameterSpec, sites: Sequence[SiteSpec]) -> int:
    """Into how many projections of equal size the calls divide the rows of a weight."""
    if sites[0].layer.slices != "rows":
        return 1
    ends = [end for site in sites for end in site.rows or ()]
    packed = [spec.shape[0] // site.packed for site in sites]
    return spec.shape[0] // gcd(spec.shape[0], *ends, *packed)


def _generic_reason(spec: ParameterSpec, sites: Sites, unmatched: Unmatched) -> str:
    if spec.name in unmatched:
        return f"used by {unmatched[spec.name][0]}"
    layers = [w for w, group in sites.items() if any(s.bias == spec.name for s in group)]
    if layers:
        return f"bias of a layer without a block for it ({', '.join(layers)})"
    return NOT_USED


def refuse_generic_layers(plan: CurvaturePlan, uses: Sequence[GraphUses]) -> None:
    """Raise :class:`CoverageError` for a conv or linear weight that is generic, naming the use."""
    weights = {s.weight for use in uses for s in use.sites if not s.layer.is_norm}
    weights |= {u.parameter for use in uses for u in use.unmatched if u.may_be_layer}
    refused = [g for g in plan.generic if g.name in weights]
    if refused:
        reasons = "; ".join(f"{g.name}: {g.reason}" for g in refused)
        raise CoverageError(f"strict: no curvature block for {reasons}")
