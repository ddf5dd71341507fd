"""The document's account of parameters: blocks with form, method and cost; generic; frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kfc_fx.codegen.spec import StackSpec
from kfc_fx.inspect.costs import SiteCost, site_costs
from kfc_fx.inspect.inspection import Inspection
from kfc_fx.inspect.methods import OpCall
from kfc_fx.inspect.update_costs import factor_bytes, state_bytes
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.plan.forms import DENSE_LIMIT, FactorForms
from kfc_fx.plan.spec import FACTOR_LIMIT, BlockSpec
from kfc_fx.statistics.inputs import batch_size


def block_entries(inspection: Inspection) -> list[dict[str, Any]]:
    """One entry for each block, in the order of the plan."""
    inputs = tuple(torch.empty(spec.shape, device="meta") for spec in inspection.inputs)
    share = inspection.request.share(batch_size((inputs, {})), inspection.fisher)
    costs = [cost for graph in inspection.graphs for cost in site_costs(graph, share)]
    stacks = {b.name: stack for stack in _stacks(inspection) for b in stack.blocks}
    return [
        _entry(
            inspection,
            block,
            stacks[block.name],
            [cost for cost in costs if cost.block == block.name],
        )
        for block in inspection.plan.blocks
    ]


def _stacks(inspection: Inspection) -> tuple[StackSpec, ...]:
    return inspection.spec.stacks if inspection.spec else ()


def _entry(
    inspection: Inspection,
    block: BlockSpec,
    stack: StackSpec,
    costs: Sequence[SiteCost],
) -> dict[str, Any]:
    assert inspection.spec is not None
    calls = [call for cost in costs for call in cost.calls]
    method, why = chosen_method(block, stack.forms, calls)
    share = block.groups / stack.depth
    return {
        "name": block.name,
        "kind": block.kind,
        "weight": block.weight,
        "bias": block.bias,
        "groups": block.groups,
        "rows": block.rows,
        "columns": block.columns,
        "locations": block.locations,
        "grows_with_locations": block.grows_with_locations,
        "geometry": geometry_text(block.geometry),
        "form": form_text(block, stack.forms),
        "method": method,
        "why": why,
        "milliseconds": sum(call.milliseconds or 0 for call in calls) or None,
        "stack": stack.key,
        "bytes": round(factor_bytes(inspection.spec, stack) * share),
        "state_bytes": round(sum(state_bytes(inspection.spec, stack).values()) * share),
        "flops": sum(cost.work.flops for cost in costs),
        "bytes_moved": sum(cost.work.bytes for cost in costs),
        "uses": block.uses,
        "sharing": block.sharing,
    }


def chosen_method(block: BlockSpec, forms: FactorForms, calls: Sequence[OpCall]) -> tuple[str, str]:
    """Method of the patch side's factor, and why form and method are what they are."""
    reasons = _form_reasons(block, forms)
    if block.layer.method:
        return block.layer.method, "; ".join(reasons)
    if forms.input == "diagonal":
        return "squares", "; ".join(reasons)
    if not calls:
        return "none", "no site emits in the captured graphs"
    patch_side = max(calls, key=lambda call: call.offsets)
    return patch_side.method, "; ".join([*reasons, patch_side.why])


def _form_reasons(block: BlockSpec, forms: FactorForms) -> list[str]:
    reasons = [block.layer.why] if block.layer.why else []
    if forms.input == "diagonal" and block.layer.diagonal_input == "wide":
        reasons.append(f"Ω would be {block.columns} wide, over {FACTOR_LIMIT}: its diagonal")
    if forms.input == "separable":
        limit = f", over {DENSE_LIMIT}" if block.columns > DENSE_LIMIT else ""
        reasons.append(
            f"Ω would be {block.columns} wide{limit}: {block.channels} channels and "
            f"{block.offsets} offsets apart"
        )
    if forms.output == "diagonal" and block.layer.diagonal_output == "wide":
        reasons.append(f"Γ would be {block.rows} wide, over {FACTOR_LIMIT}: its diagonal")
    for factor, side, parts in _cuts(block, forms):
        reasons.append(f"{factor} would be {side} wide, over the basis_limit: {parts} parts")
    return reasons


def _cuts(block: BlockSpec, forms: FactorForms) -> list[tuple[str, int, int]]:
    """Name, side and parts of the factors that are cut."""
    both = (("Ω", block.channels, forms.input_parts), ("Γ", block.rows, forms.output_parts))
    return [each for each in both if each[2] > 1]


def form_text(block: BlockSpec, forms: FactorForms) -> str:
    """Form of Ω, and of Γ where it is diagonal and has more than one entry; parts of both."""
    diagonal = forms.output == "diagonal" and block.rows > 1
    cuts = "".join(f", {factor} in {parts}" for factor, _, parts in _cuts(block, forms))
    return (f"{forms.input}, Γ diagonal" if diagonal else forms.input) + cuts


def geometry_text(geometry: ConvGeometry) -> str:
    """``3x3 stride 2 padding 1``, defaults left out; empty for a linear layer."""
    if not geometry.ndim:
        return ""
    parts = [_sizes(geometry.kernel_size, always=True)]
    if any(step != 1 for step in geometry.stride):
        parts.append(f"stride {_sizes(geometry.stride)}")
    if any(map(any, geometry.padding)):
        even = all(before == after for before, after in geometry.padding)
        pads = [before if even else f"{before}+{after}" for before, after in geometry.padding]
        parts.append(f"padding {_sizes(pads)}")
    if any(step != 1 for step in geometry.dilation):
        parts.append(f"dilation {_sizes(geometry.dilation)}")
    if geometry.groups > 1:
        parts.append(f"groups {geometry.groups}")
    return " ".join(parts)


def _sizes(values: Sequence[Any], *, always: bool = False) -> str:
    same = len(set(values)) == 1 and not always
    return str(values[0]) if same else "x".join(map(str, values))


def generic_entries(inspection: Inspection) -> list[dict[str, Any]]:
    """One entry for each parameter without a block, with the reason."""
    return [
        {"name": g.name, "shape": list(g.shape), "reason": g.reason}
        for g in inspection.plan.generic
    ]
