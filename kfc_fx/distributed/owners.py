"""Which rank owns which block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.plan.spec import BlockSpec


@lru_cache(maxsize=16)
def owners_of(
    spec: UpdateSpec, ranks: int, known: tuple[tuple[str, int], ...] = ()
) -> Mapping[str, int]:
    """The rank that owns each block: the dearest first, to the rank with the least so far. Blocks
    of one cost go by name and ranks by number, so that all ranks find the same.

    Args:
        known: blocks that have an owner already, which keeps them, with its rank.
    """
    costs = {b.name: refresh_cost(stack, b) for stack in spec.stacks for b in stack.blocks}
    load = [0] * ranks
    owners: dict[str, int] = {}
    for name, owner in known:
        if name in costs:
            owners[name] = owner
            load[owner] += costs[name]
    for name in sorted(costs.keys() - owners.keys(), key=lambda name: (-costs[name], name)):
        owner = min(range(ranks), key=lambda rank: (load[rank], rank))
        owners[name] = owner
        load[owner] += costs[name]
    return MappingProxyType(owners)


def refresh_cost(stack: StackSpec, block: BlockSpec) -> int:
    """Multiplications of a refresh up to a constant: ``n³`` of each side n of its factors, and
    those that turn its moments."""
    sides = 0
    for shape in stack.basis_shapes.values():
        count = shape[0] // stack.depth * block.groups
        sides += count * shape[-1] ** 3
    widths = sum(shape[-1] for shape in stack.basis_shapes.values())
    return sides + block.groups * block.rows * block.columns * widths


def imbalance(spec: UpdateSpec, ranks: int) -> float:
    """Refresh work of the busiest rank over that of the mean one."""
    owners = owners_of(spec, ranks)
    load = [0] * ranks
    for stack in spec.stacks:
        for block in stack.blocks:
            load[owners[block.name]] += refresh_cost(stack, block)
    return max(load) * ranks / max(sum(load), 1)
