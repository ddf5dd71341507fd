"""Parameters that are sharded over ranks: which part of each a rank has."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

from kfc_fx.errors import OptionError


@dataclass(frozen=True)
class Sharding:
    """How one parameter lies on the ranks: in chunks of one dimension, on replicas of these."""

    shape: tuple[int, ...]
    """Of the whole."""
    dim: int
    chunks: tuple[tuple[int, int], ...]
    """Start and length of each rank's chunk along ``dim``."""
    replicas: tuple[int, ...]
    """The replica of the whole that each rank's chunk belongs to."""

    def numbers(self, rank: int) -> int:
        """How many a rank has."""
        whole = torch.Size(self.shape).numel()
        return whole // max(self.shape[self.dim], 1) * self.chunks[rank][1]

    def chunk(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's part of the whole, a view."""
        return whole.narrow(self.dim, *self.chunks[rank])

    def shape_of(self, rank: int) -> tuple[int, ...]:
        """Shape of a rank's part."""
        start = self.shape[: self.dim]
        return (*start, self.chunks[rank][1], *self.shape[self.dim + 1 :])


def is_distributed(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``: there is none before somebody has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether a tensor among these is distributed."""
    return any(map(is_distributed, tensors))


def sharding_of(name: str, parameter: Tensor, ranks: tuple[int, ...]) -> Sharding | None:
    """That of a parameter; None for one that every rank has whole.

    Args:
        ranks: the optimizer's, as numbers among all processes.

    Raises:
        OptionError: it lies in another way than ``fully_shard`` lays it, or on other ranks.
    """
    if not is_distributed(parameter):
        return None
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = parameter.device_mesh, parameter.placements
    dims = [number for number, own in enumerate(placements) if not isinstance(own, Replicate)]
    kinds = {type(placements[number]) for number in dims}
    if len(dims) > 1 or not kinds <= {Shard}:
        raise OptionError(
            f"{name} is sharded as {placements}: KFC trains what fully_shard shards over one "
            "dimension of a mesh, replicated over the others. Tensor parallel parameters "
            "(parallelize_module) are not among them"
        )
    members = [int(rank) for rank in mesh.mesh.flatten()]
    if sorted(members) != sorted(ranks):
        raise OptionError(
            f"{name} is sharded over ranks {sorted(members)}, and the optimizer's are "
            f"{sorted(ranks)}: pass the process group of the mesh, process_group=mesh.get_group()"
        )
    if not dims:
        return None
    (mesh_dim,) = dims
    placement = placements[mesh_dim]
    assert isinstance(placement, Shard)
    shape = tuple(parameter.shape)
    chunks: dict[int, tuple[int, int]] = {}
    replicas: dict[int, int] = {}
    for rank in members:
        coordinate = [int(c) for c in (mesh.mesh == rank).nonzero()[0]]
        chunks[rank] = chunk_of(shape[placement.dim], coordinate[mesh_dim], mesh.size(mesh_dim))
        replica = 0
        for number, own in enumerate(coordinate):
            if number != mesh_dim:
                replica = replica * mesh.size(number) + own
        replicas[rank] = replica
    return Sharding(
        shape,
        placement.dim,
        tuple(chunks[rank] for rank in ranks),
        tuple(replicas[rank] for rank in ranks),
    )


def chunk_of(size: int, index: int, count: int) -> tuple[int, int]:
    """Start and length of one chunk, as ``torch.chunk`` divides: the last ones may be shorter, or
    empty."""
    length = -(-size // count)
    start = min(index * length, size)
    return start, min(start + length, size) - start


def local_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has, in the same memory."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def locals_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of several, by name."""
    return {name: local_of(tensor) for name, tensor in tensors.items()}


class Shards:
    """The parameters of blocks on all ranks, and their way to the owners and back.

    Args:
        owned: by rank the parameters of its blocks, with their shapes.
        parameters: all, by name.
        ranks: as numbers among all processes.
        rank: of this one in ``ranks``.
    """

    def __init__(
        self,
        owned: list[dict[str, tuple[int, ...]]],
        parameters: Mapping[str, Tensor],
        ranks: tuple[int, ...],
        rank: int,
    ) -> None:
        self._owned, self._rank, self._count = owned, rank, len(ranks)
        self._shardings = {
            name: sharding_of(name, parameters[name], ranks) for own in owned for name in own
        }

    @cached_property
    def to_owners(self) -> list[dict[str, int]]:
        """How many numbers of each parameter this rank sends to each."""
        return [self._sent(self._rank, owner) for owner in range(self._count)]

    @cached_property
    def from_ranks(self) -> list[dict[str, int]]:
        """How many numbers of each parameter this rank gets from each, as their owner."""
        return [self._sent(rank, self._rank) for rank in range(self._count)]

    def _sent(self, rank: int, owner: int) -> dict[str, int]:
        """Numbers of gradients from one rank to an owner: of the owner's replica alone; and what
        the owner has whole it needs from nobody."""
        found = {}
        for name in self._owned[owner]:
            sharding = self._shardings[name]
            if sharding is not None and sharding.replicas[rank] == sharding.replicas[owner]:
                found[name] = sharding.numbers(rank)
        return found

    @cached_property
    def steps_from(self) -> list[dict[str, int]]:
        """How many numbers of steps this rank gets from each owner."""
        return [self._returned(owner, self._rank) for owner in range(self._count)]

    @cached_property
    def steps_to(self) -> list[dict[str, int]]:
        """How many numbers of steps this rank sends to each, as their owner."""
        return [self._returned(self._rank, rank) for rank in range(self._count)]

    def _returned(self, owner: int, rank: int) -> dict[str, int]:
        found = {}
        for name, shape in self._owned[owner].items():
            sharding = self._shardings[name]
            whole = torch.Size(shape).numel()
            found[name] = whole if sharding is None else sharding.numbers(rank)
        return found

    def place(self, name: str, whole: Tensor, part: Tensor, rank: int) -> None:
        """Write what a rank has sent of a gradient into the whole."""
        sharding = self._shardings[name]
        assert sharding is not None
        sharding.chunk(whole, rank).copy_(part.view(sharding.shape_of(rank)))

    def is_whole(self, name: str) -> bool:
        """Whether every rank has all of a parameter."""
        return self._shardings[name] is None

    def part_for(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """What a rank needs of a step."""
        sharding = self._shardings[name]
        return whole if sharding is None else sharding.chunk(whole, rank)

    def shape_here(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this rank's part of a parameter."""
        sharding = self._shardings[name]
        return shape if sharding is None else sharding.shape_of(self._rank)
