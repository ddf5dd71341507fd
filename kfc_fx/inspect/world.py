"""What many processes would hold, send and compute, counted without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.distributed.generic_rows import divided
from kfc_fx.distributed.owners import busiest_share, owners_of, refresh_cost
from kfc_fx.distributed.packing import size_of
from kfc_fx.distributed.ranks import pads
from kfc_fx.distributed.refresh import refresh_layouts
from kfc_fx.distributed.statistics import statistics_layout
from kfc_fx.inspect.inspection import Inspection
from kfc_fx.inspect.update_costs import state_bytes
from kfc_fx.linalg.half import kept_dtype
from kfc_fx.plan.spec import BlockSpec

Way = Literal["none", "refresh", "update", "shard"]
WAYS: tuple[Way, ...] = ("none", "refresh", "update", "shard")
"""Ways of the optimizer under DistributedDataParallel, and what ``fully_shard`` makes of it."""


@dataclass(frozen=True)
class Machine:
    """A device and its network, for times.

    Attributes:
        tflops: of products, in 10¹² operations a second.
        memory: 10⁹ bytes a second that a device moves.
        network: 10⁹ bytes a second that a rank sends.
    """

    tflops: float = 60.0
    memory: float = 2000.0
    network: float = 25.0

    def seconds(self, flops: float, moved: float) -> float:
        """The longer of computing and moving."""
        return max(flops / (self.tflops * 1e12), moved / (self.memory * 1e9))

    def sending(self, sent: float) -> float:
        """Seconds for what a rank sends."""
        return sent / (self.network * 1e9)


@dataclass(frozen=True)
class World:
    """What one number of ranks makes of an update; bytes are those of the busiest rank."""

    ranks: int
    state_bytes: int
    """Of the optimizer, on the rank that has most."""
    state_share: float
    """Over that of one process."""
    gradient_sent: float
    """Bytes that a rank sends for the gradients alone, a step."""
    step_sent: float
    """Bytes that a rank sends for KFC at every step."""
    due_sent: float
    """Bytes more at a step with statistics."""
    traffic: float
    """All that a rank sends in the mean step over what the gradients take."""
    imbalance: float
    """Refresh work of the busiest rank over that of the mean one."""
    mean_step: float
    """Expected mean step, in steps of SGD on as many ranks."""


def world_of(
    inspection: Inspection,
    summary: Mapping[str, float],
    ranks: int,
    way: Way,
    machine: Machine,
) -> World:
    """What a number of ranks makes of the update of an inspected model, whose input is the batch of
    one rank.

    Args:
        inspection: of a model with blocks.
        summary: of its document, the counted costs.
    """
    spec = inspection.spec
    assert spec is not None
    parameters = inspection.parameters
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    owners = owners_of(spec, ranks)
    around = (ranks - 1) / ranks
    refresh_share = busiest_share(spec, owners, ranks)
    apply_share = busiest_share(spec, owners, ranks, _apply_cost)
    state, whole_state = _state(inspection, spec, owners, ranks, way)
    gradient_sent = around * size * (3 if way == "shard" else 2)
    due_sent = 2 * around * statistics_layout(spec).bytes
    step_sent = 0.0
    if way == "refresh":
        sizes = [4 * size_of(layout.values()) for layout in refresh_layouts(spec, ranks)]
        due_sent += _gathered(sizes)
    own = _owned_bytes(spec, owners, ranks)
    if way == "update":
        step_sent = _gathered(list(map(sum, zip(own, _rows_bytes(spec, ranks), strict=True))))
    elif way == "shard":
        step_sent = around * (sum(own) / ranks + max(own))
    every = inspection.optimizer.options.statistics.every
    divided = {"none": (1.0, 1.0), "refresh": (refresh_share, 1.0)}
    of_refresh, of_update = divided.get(way, (refresh_share, apply_share))
    sgd = machine.seconds(summary["gradient_flops"], summary["gradient_bytes"])
    sgd += machine.sending(gradient_sent)
    kfc = sgd + machine.sending(step_sent + due_sent / every)
    kfc += of_update * machine.seconds(summary["update_flops"], summary["update_bytes"])
    kfc += machine.seconds(summary["statistics_flops"], summary["statistics_bytes"]) / every
    refresh = machine.seconds(summary["refresh_flops"], summary["refresh_bytes"])
    kfc += of_refresh * refresh / inspection.optimizer.options.statistics.refresh_every
    mean_sent = gradient_sent + step_sent + due_sent / every
    return World(
        ranks=ranks,
        state_bytes=state,
        state_share=state / whole_state,
        gradient_sent=gradient_sent,
        step_sent=step_sent,
        due_sent=due_sent,
        traffic=mean_sent / gradient_sent if gradient_sent else 1.0,
        imbalance=refresh_share * ranks if way != "none" else 1.0,
        mean_step=kfc / sgd,
    )


def world_document(
    inspection: Inspection, summary: Mapping[str, float], ranks: int, way: Way, machine: Machine
) -> dict[str, Any]:
    """As plain data: this number of ranks and some others, and who owns what of this one."""
    counts = sorted({1, 8, 64, 512, ranks})
    spec = inspection.spec
    assert spec is not None
    owners = owners_of(spec, ranks)
    blocks = {block.name: (stack, block) for stack in spec.stacks for block in stack.blocks}
    total = sum(refresh_cost(*pair) for pair in blocks.values())
    owned = []
    for rank in range(ranks):
        names = [name for name in blocks if owners[name] == rank]
        cost = sum(refresh_cost(*blocks[name]) for name in names)
        held = sum(_state_bytes(spec, *blocks[name]) for name in names)
        owned.append(
            {"rank": rank, "blocks": names, "refresh_share": cost / total, "state_bytes": held}
        )
    return {
        "way": way,
        "ranks": ranks,
        "machine": asdict(machine),
        "worlds": [asdict(world_of(inspection, summary, n, way, machine)) for n in counts],
        "owners": owned,
    }


def _state_bytes(spec: UpdateSpec, stack: StackSpec, block: BlockSpec) -> int:
    return sum(state_bytes(spec, stack).values()) // stack.depth * block.groups


def _state(
    inspection: Inspection, spec: UpdateSpec, owners: Mapping[str, int], ranks: int, way: Way
) -> tuple[int, int]:
    """Bytes of state on the rank that has most, and in one process."""
    load, everywhere = [0] * ranks, 0
    for stack in spec.stacks:
        for block in stack.blocks:
            load[owners[block.name]] += _state_bytes(spec, stack, block)
    parameters = inspection.parameters
    kept = 2 if spec.generic_rule == "adamw" else 1
    for generic in spec.generic:
        rows = divided(generic.shape, ranks) if way != "shard" else None
        size = kept * kept_dtype(torch.float32, halves=spec.half_moments).itemsize
        moments = size * parameters[generic.name].numel()
        if rows is not None:
            load = [own + size * rows.numbers(rank) for rank, own in enumerate(load)]
        elif way == "shard":
            load = [own + -(-moments // ranks) for own in load]
        else:
            everywhere += moments
    whole = sum(load) + everywhere
    return (whole if way in ("none", "refresh") else max(load) + everywhere), whole


def _owned_bytes(spec: UpdateSpec, owners: Mapping[str, int], ranks: int) -> list[int]:
    """Bytes of the steps of its blocks that each rank sends."""
    load = [0] * ranks
    for stack in spec.stacks:
        for block in stack.blocks:
            numbers = torch.Size(block.weight_shape).numel()
            numbers += torch.Size(block.bias_shape).numel() if block.bias else 0
            load[owners[block.name]] += numbers * getattr(torch, stack.dtype).itemsize
    return load


def _rows_bytes(spec: UpdateSpec, ranks: int) -> list[int]:
    """Bytes of the steps of large parameters without a block that each rank sends."""
    found = [divided(generic.shape, ranks) for generic in spec.generic]
    return [sum(4 * own.numbers(rank) for own in found if own is not None) for rank in range(ranks)]


def _gathered(sizes: Sequence[int]) -> float:
    """Bytes that a rank sends for parts of these sizes to come to all."""
    ranks = len(sizes)
    longest = ranks * max(sizes) if pads(sizes) else 2 * sum(sizes)
    return (ranks - 1) / ranks * longest


def _apply_cost(stack: StackSpec, block: BlockSpec) -> int:
    widths = sum(shape[-1] for shape in stack.basis_shapes.values())
    return block.groups * block.rows * block.columns * (1 + widths)
