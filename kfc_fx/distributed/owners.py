"""Which rank owns which block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from types import MappingProxyType

from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.plan.spec import BlockSpec


@lru_cache(maxsize=16)
def owners_of(
    spec: UpdateSpec, ranks: int, known: tuple[tuple[str, int], ...] = ()
) -> Mapping[str, int]:
    """The rank that owns each block, so that refreshes and what is sent of them are both shared
    evenly: the dearest first, each to the rank whose larger share of the two is least then. Blocks
    of one cost go by name and ranks by number, so that all ranks find the same.

    Args:
        known: blocks that have an owner already, which keeps them, with its rank.
    """
    blocks = {block.name: (stack, block) for stack in spec.stacks for block in stack.blocks}
    work = _shares({name: refresh_cost(*pair) for name, pair in blocks.items()})
    size = _shares({name: numbers(*pair) for name, pair in blocks.items()})
    load = [(0.0, 0.0)] * ranks
    owners: dict[str, int] = {}

    def after(name: str, rank: int) -> tuple[float, float]:
        return load[rank][0] + work[name], load[rank][1] + size[name]

    def give(name: str, rank: int) -> None:
        owners[name], load[rank] = rank, after(name, rank)

    for name, owner in known:
        if name in blocks:
            give(name, owner)
    left = blocks.keys() - owners.keys()
    for name in sorted(left, key=lambda name: (-max(work[name], size[name]), name)):
        give(name, min(range(ranks), key=lambda rank: (max(after(name, rank)), rank)))
    return MappingProxyType(owners)


def _shares(costs: Mapping[str, int]) -> dict[str, float]:
    total = max(sum(costs.values()), 1)
    return {name: cost / total for name, cost in costs.items()}


def numbers(stack: StackSpec, block: BlockSpec) -> int:
    """Those of a block's bases and moments, about as many as its owner holds or sends of it."""
    bases = sum(prod(s) // stack.depth * block.groups for s in stack.basis_shapes.values())
    return bases + 2 * block.groups * block.rows * block.columns


def refresh_cost(stack: StackSpec, block: BlockSpec) -> int:
    """Multiplications of a refresh up to a constant: ``n³`` of each side n of its factors, and
    those that turn its moments."""
    sides = 0
    for shape in stack.basis_shapes.values():
        count = shape[0] // stack.depth * block.groups
        sides += count * shape[-1] ** 3
    widths = sum(shape[-1] for shape in stack.basis_shapes.values())
    return sides + block.groups * block.rows * block.columns * widths


def busiest_share(
    spec: UpdateSpec,
    owners: Mapping[str, int],
    ranks: int,
    cost: Callable[[StackSpec, BlockSpec], int] = refresh_cost,
) -> float:
    """The share of some work on blocks that the busiest rank has: 1/ranks, were it even."""
    load = [0] * ranks
    for stack in spec.stacks:
        for block in stack.blocks:
            load[owners[block.name]] += cost(stack, block)
    return max(load) / max(sum(load), 1)
