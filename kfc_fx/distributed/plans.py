"""One plan of what several ranks have captured: each may have seen other branches of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kfc_fx.distributed.agreement import digest
from kfc_fx.errors import StepError
from kfc_fx.plan.coverage import NOT_USED
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan, GenericSpec

OF_THE_CAPTURE = ("locations", "uses")
"""What depends on the inputs of a capture, and makes no other block."""


@dataclass(frozen=True)
class PlanText:
    """What a rank tells of its plan, as plain data."""

    blocks: tuple[dict[str, Any], ...]
    generic: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, plan: CurvaturePlan) -> PlanText:
        """From a plan."""
        return cls(
            tuple(block.as_dict() for block in plan.blocks),
            tuple(asdict(generic) for generic in plan.generic),
        )

    @property
    def digest(self) -> int:
        """A number that is the same for plans of the same blocks."""
        blocks = sorted((_essence(block) for block in self.blocks), key=str)
        generic = sorted((own["name"], own["reason"] == NOT_USED) for own in self.generic)
        return digest(json.dumps([blocks, generic]))


def merged_plan(
    own: CurvaturePlan, texts: Sequence[PlanText], order: Sequence[str]
) -> CurvaturePlan:
    """The plan that all ranks take: a layer that is a block on one rank and not used on the others
    is a block, and a parameter that is generic for another reason on one rank is so on all.

    Args:
        own: of this rank.
        texts: of all ranks, in their order.
        order: names of all parameters.

    Raises:
        StepError: a layer is another block on one rank than on another.
    """
    blocks: dict[str, dict[str, Any]] = {}
    generic: dict[str, dict[str, Any]] = {}
    for rank, text in enumerate(texts):
        for block in text.blocks:
            known = blocks.setdefault(block["weight"], block)
            if _essence(known) != _essence(block):
                raise StepError(
                    f"layer {block['name']!r} is captured as another block on rank {rank} than on "
                    "one before it: build the same model, and call it in the same way, on all ranks"
                )
        for parameter in text.generic:
            known = generic.setdefault(parameter["name"], parameter)
            if known["reason"] == NOT_USED:
                generic[parameter["name"]] = parameter
    refused = {name for name, parameter in generic.items() if parameter["reason"] != NOT_USED}
    taken = {
        weight: BlockSpec.from_dict(block)
        for weight, block in blocks.items()
        if not refused & {weight, block["bias"]}
    }
    held = {name for block in taken.values() for name in block.parameters}
    left = _left_out(blocks, taken)
    rest = {
        name: GenericSpec(name, tuple(p["shape"]), p["reason"])
        for name, p in {**left, **generic}.items()
        if name not in held
    }
    names = [name for name in order if name not in own.frozen]
    return replace(
        own,
        blocks=tuple(taken[name] for name in names if name in taken),
        generic=tuple(rest[name] for name in names if name in rest),
    )


def _left_out(
    blocks: Mapping[str, Mapping[str, Any]], taken: Mapping[str, BlockSpec]
) -> dict[str, dict[str, Any]]:
    """The other parameters of layers that are no block because one of theirs is generic."""
    found = {}
    for weight, block in blocks.items():
        if weight not in taken:
            pairs = ((weight, block["weight_shape"]), (block["bias"], block["bias_shape"]))
            for name, shape in pairs:
                if name is not None:
                    reason = "generic on another rank, with its layer"
                    found[name] = {"name": name, "shape": shape, "reason": reason}
    return found


def _essence(block: Mapping[str, Any]) -> dict[str, Any]:
    essence: dict[str, Any] = json.loads(json.dumps(dict(block), sort_keys=True))
    return {name: value for name, value in essence.items() if name not in OF_THE_CAPTURE}
