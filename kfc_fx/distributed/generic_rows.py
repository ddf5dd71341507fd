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
from kfc_fx.errors import OptionError

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
    """

    def __init__(
        self,
        spec: UpdateSpec,
        parameters: Mapping[str, Tensor],
        held: Iterable[str],
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        device = torch.device(spec.stacks[0].device)
        in_blocks = {n for stack in spec.stacks for block in stack.blocks for n in block.parameters}
        shapes = {
            name: tuple(parameters[name].shape)
            for name in dict.fromkeys([*(generic.name for generic in spec.generic), *held])
            if name in parameters and name not in in_blocks and parameters[name].device == device
        }
        found = {name: divided(shape, ranks.count) for name, shape in shapes.items()}
        self.known: dict[str, Sharding] = {
            name: sharding for name, sharding in found.items() if sharding is not None
        }
        """By name, of those that are divided."""
        updated = {generic.name for generic in spec.generic}
        self.shardings: dict[str, Sharding] = {
            n: sharding for n, sharding in self.known.items() if n in updated
        }
        """The same of those that are updated now."""
        self.own: tuple[GenericParameter, ...] = tuple(
            GenericParameter(name, sharding.shape_of(ranks.rank), converts=False)
            for name, sharding in self.shardings.items()
        )
        """The rows of this rank, as parameters that a spec may have."""

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that is shaped like a parameter, a view."""
        return self.shardings[name].chunk(whole, self._ranks.rank)

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """The rows of all ranks, whole."""
        return torch.cat(parts, self.shardings[name].dim)

    def local(self, generic: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Moments of which those that are divided are this rank's rows. Ranks need not ask
        together: nothing is sent. Moments of a parameter of another size are left out.

        Raises:
            OptionError: of a parameter that is not divided there are the rows of some rank.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, entry in generic.items():
            sharding = self.known.get(name)
            if sharding is None:
                _refuse_parts(name, entry)
                found[name] = dict(entry)
            elif all(tuple(value.shape) == sharding.shape for value in entry.values()):
                found[name] = {key: self._rows(sharding, value) for key, value in entry.items()}
        return found

    def _rows(self, sharding: Sharding, value: Tensor) -> Tensor:
        if not is_distributed(value):
            return sharding.chunk(value, self._ranks.rank).clone()
        return value.to_local()

    def distributed(
        self, generic: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """The inverse of :meth:`local`: what is divided as this rank's part of a ``DTensor``, which
        says what it is a part of."""
        return {
            name: {key: self._distributed(self.known[name], own) for key, own in entry.items()}
            if name in self.known
            else dict(entry)
            for name, entry in generic.items()
        }

    def _distributed(self, sharding: Sharding, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

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


def whole_where_foreign(
    generic: Mapping[str, Mapping[str, Tensor]], ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """Moments of whole parameters as :meth:`GenericRows.local` takes them: those that are divided
    in another way, or among others, are made whole. All ranks ask together."""

    def fit(value: Tensor) -> Tensor:
        if not is_distributed(value):
            return value
        sharding = divided(tuple(value.shape), ranks.count)
        members = tuple(int(rank) for rank in value.device_mesh.mesh.flatten())
        placed = value.placements
        same = sharding is not None and members == ranks.members and len(placed) == 1
        return value if same and placed[0].is_shard(sharding.dim) else value.full_tensor()  # type: ignore[union-attr]

    return {
        name: {key: fit(value) for key, value in entry.items()} for name, entry in generic.items()
    }


def _refuse_parts(name: str, entry: Mapping[str, Tensor]) -> None:
    if any(map(is_distributed, entry.values())):
        raise OptionError(
            f"the moments of {name} are divided among the ranks, and it lies elsewhere than the "
            "blocks now: load what opt.consolidate_state_dict() has made whole"
        )


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
