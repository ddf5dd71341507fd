"""Generic parameters that every rank has whole, and whose moments and steps are divided by rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfc_fx.codegen.spec import GenericParameter, UpdateSpec
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.shards import Sharding, chunk_of, is_distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LEAST_NUMBERS = 1 << 16
"""Smaller parameters are stepped by every rank: their moments are next to nothing."""
EVEN = 1.1
"""How much longer than an even one the longest chunk of a parameter may be."""


class GenericRows:
    """Which rows of which generic parameter a rank has moments of and steps.

    Args:
        spec: of the whole update.
        parameters: all, by name, none of them sharded.
        held: those that there are moments of, some of which may not be updated now.
        dtype: of the buffer that steps are sent in. Parameters with moments in another one are
            stepped by every rank.
    """

    def __init__(
        self,
        spec: UpdateSpec,
        parameters: Mapping[str, Tensor],
        held: Iterable[str],
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> None:
        self._ranks = ranks
        device = torch.device(spec.stacks[0].device)

        def fits(parameter: Tensor) -> bool:
            own = torch.promote_types(parameter.dtype, torch.float32)
            return parameter.device == device and own == dtype

        in_blocks = {n for stack in spec.stacks for block in stack.blocks for n in block.parameters}
        shapes = {
            name: tuple(parameters[name].shape)
            for name in dict.fromkeys([*(generic.name for generic in spec.generic), *held])
            if name in parameters and name not in in_blocks and fits(parameters[name])
        }
        found = {name: divided(shape, ranks.count) for name, shape in shapes.items()}
        self._all = {name: sharding for name, sharding in found.items() if sharding is not None}
        updated = {generic.name: generic for generic in spec.generic}
        self.shardings: dict[str, Sharding] = {
            n: sharding for n, sharding in self._all.items() if n in updated
        }
        """By name, of those that are divided and updated."""
        self.own: tuple[GenericParameter, ...] = tuple(
            GenericParameter(name, sharding.shape_of(ranks.rank), updated[name].converts)
            for name, sharding in self.shardings.items()
        )
        """The rows of this rank, as parameters that a spec may have."""

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that is shaped like a parameter, a view."""
        return self.shardings[name].chunk(whole, self._ranks.rank)

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """The rows of all ranks, whole."""
        return torch.cat(parts, self.shardings[name].dim)

    def local(self, name: str, value: Tensor) -> Tensor:
        """This rank's rows of a value in any form: of this rank alone, of all, or distributed."""
        sharding = self._all.get(name)
        if sharding is None:
            return value
        if is_distributed(value):
            value = value.full_tensor()
        is_whole = tuple(value.shape) == sharding.shape
        return sharding.chunk(value, self._ranks.rank).clone() if is_whole else value

    def is_part(self, name: str, value: Tensor) -> bool:
        """Whether a value has the rows of this rank alone."""
        sharding = self._all.get(name)
        return sharding is not None and tuple(value.shape) == sharding.shape_of(self._ranks.rank)

    def distributed(self, name: str, part: Tensor) -> Tensor:
        """This rank's rows as a part of a ``DTensor``."""
        from torch.distributed.tensor import DTensor, Shard

        sharding = self._all[name]
        strides = [prod(sharding.shape[dim + 1 :]) for dim in range(len(sharding.shape))]
        return DTensor.from_local(
            part,
            self._mesh,
            [Shard(sharding.dim)],
            run_check=False,
            shape=torch.Size(sharding.shape),
            stride=tuple(strides),
        )

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return self._ranks.mesh()


def divided(shape: tuple[int, ...], ranks: int) -> Sharding | None:
    """How a parameter is divided: along its first dimension whose longest chunk is at most
    :data:`EVEN` times an even one, or else the one with the most even chunks. None for one that is
    small, or has no dimension to divide."""
    if prod(shape) < LEAST_NUMBERS:
        return None
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    if not wide:
        return None
    longest = {dim: -(-shape[dim] // ranks) * ranks / shape[dim] for dim in wide}
    dim = min(wide, key=lambda dim: (longest[dim] > EVEN, longest[dim] > EVEN and longest[dim]))
    chunks = tuple(chunk_of(shape[dim], rank, ranks) for rank in range(ranks))
    return Sharding(shape, dim, chunks, (0,) * ranks)
