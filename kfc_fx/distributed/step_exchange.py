"""How gradients come to the owners of blocks, and their steps to everybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.generic_rows import GenericRows
from kfc_fx.distributed.packing import Slot, size_of, views_of
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.shards import Shards, locals_of

Layouts = Sequence[Mapping[str, Slot]]
"""By rank the parameters of the blocks that it owns, and its rows of others, with their shapes."""


class StepExchange(Protocol):
    """Between the parts of a step that ranks take by themselves."""

    @property
    def steps(self) -> Mapping[str, Tensor]:
        """Where the steps of this rank's blocks are written, in the shapes of whole parameters."""

    def receive(self, gradients: Mapping[str, Tensor], attempt: Attempt) -> bool:
        """Bring gradients to their owners; returns whether all are finite, on all ranks.

        Raises:
            StepError: something has failed on another rank.
        """

    def owned(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole gradients of this rank's blocks, of those that there are."""

    def send(self, attempt: Attempt) -> dict[str, Tensor]:
        """Bring the steps of all blocks to this rank, in the shapes of what it has.

        Raises:
            StepError: something has failed on another rank.
        """


class ReplicatedSteps:
    """Every rank has all gradients and all parameters: steps are gathered."""

    def __init__(
        self,
        layouts: Layouts,
        rows: GenericRows,
        ranks: Ranks,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layouts, self._rows, self._ranks = layouts, rows, ranks
        self._sizes = [size_of(layout.values()) + 1 for layout in layouts]
        self._sent = torch.zeros(self._sizes[ranks.rank], dtype=dtype, device=device)
        self.steps: dict[str, Tensor] = views_of(layouts[ranks.rank], self._sent)

    def receive(self, gradients: Mapping[str, Tensor], attempt: Attempt) -> bool:
        """See :class:`StepExchange`; nobody sends anything."""
        raise NotImplementedError("gradients that all ranks have are looked at by each")

    def owned(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`StepExchange`."""
        divided = self._rows.shardings
        dtype = self._sent.dtype  # in which an owner has the moments of its rows
        return {
            name: self._rows.part(name, gradients[name]).to(dtype)
            if name in divided
            else gradients[name]
            for name in self.steps
            if name in gradients
        }

    def send(self, attempt: Attempt) -> dict[str, Tensor]:
        """See :class:`StepExchange`."""
        self._sent[-1] = float(attempt.failed)
        parts = self._ranks.gather_parts(self._sent, self._sizes)
        attempt.settle(torch.stack([part[-1] for part in parts]).nonzero()[:, 0].tolist())
        everywhere = [
            views_of(layout, part) for layout, part in zip(self._layouts, parts, strict=True)
        ]
        found = {name: step for steps in everywhere for name, step in steps.items()}
        for name in self._rows.shardings:
            found[name] = self._rows.joined(name, [steps[name] for steps in everywhere])
        return found


class ShardedSteps:
    """Every rank has shards: those of gradients go to the owners, those of steps come back."""

    def __init__(
        self,
        layouts: Layouts,
        parameters: Mapping[str, Tensor],
        ranks: Ranks,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._ranks, self._dtype, self._device = ranks, dtype, device
        shapes = [{name: slot.shape for name, slot in layout.items()} for layout in layouts]
        self._shapes = {name: shape for own in shapes for name, shape in own.items()}
        self._shards = Shards(shapes, parameters, ranks.members, ranks.rank)
        own = layouts[ranks.rank]
        buffer = torch.zeros(size_of(own.values()), dtype=dtype, device=device)
        self.steps: dict[str, Tensor] = views_of(own, buffer)
        self._gradients: dict[str, Tensor] = {}

    def receive(self, gradients: Mapping[str, Tensor], attempt: Attempt) -> bool:
        """See :class:`StepExchange`."""
        shards, count = self._shards, self._ranks.count
        own = locals_of(gradients)
        sizes = [FLAGS + sum(sent.values()) for sent in shards.to_owners]
        buffer = torch.zeros(sum(sizes), dtype=self._dtype, device=self._device)
        finite = True
        with attempt.local():
            attempt.raise_own()
            finite = all(bool(gradient.isfinite().all()) for gradient in own.values())
            for part, sent in zip(buffer.split(sizes), shards.to_owners, strict=True):
                _fill(part[FLAGS:], sent, own)
        for part in buffer.split(sizes):
            part[0], part[1] = float(attempt.failed), float(not finite)
        expected = [FLAGS + sum(sent.values()) for sent in shards.from_ranks]
        received = self._ranks.exchange(buffer, sizes, expected).split(expected)
        flags = torch.stack([part[:FLAGS] for part in received]).cpu()
        attempt.settle(flags[:, 0].nonzero()[:, 0].tolist())
        whole = {
            name: torch.zeros(self._shapes[name], dtype=self._dtype, device=self._device)
            for name in self.steps
            if name in own and not shards.is_whole(name)
        }
        for rank in range(count):
            start = FLAGS
            for name, numbers in shards.from_ranks[rank].items():
                if name in whole:
                    shards.place(name, whole[name], received[rank][start : start + numbers], rank)
                start += numbers
        self._gradients = whole | {n: own[n] for n in self.steps if n in own and n not in whole}
        return not flags[:, 1].any()

    def owned(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`StepExchange`; as they were received, once."""
        found, self._gradients = self._gradients, {}
        return found

    def send(self, attempt: Attempt) -> dict[str, Tensor]:
        """See :class:`StepExchange`."""
        shards = self._shards
        sizes = [1 + sum(sent.values()) for sent in shards.steps_to]
        buffer = torch.zeros(sum(sizes), dtype=self._dtype, device=self._device)
        for rank, part in enumerate(buffer.split(sizes)):
            part[0] = float(attempt.failed)
            if not attempt.failed:
                parts = {n: shards.part_for(n, step, rank) for n, step in self.steps.items()}
                _fill(part[1:], shards.steps_to[rank], parts)
        expected = [1 + sum(sent.values()) for sent in shards.steps_from]
        received = self._ranks.exchange(buffer, sizes, expected).split(expected)
        flags = torch.stack([part[0] for part in received]).cpu()
        attempt.settle(flags.nonzero()[:, 0].tolist())
        found: dict[str, Tensor] = {}
        for part, sent in zip(received, shards.steps_from, strict=True):
            start = 1
            for name, numbers in sent.items():
                shape = shards.shape_here(name, self._shapes[name])
                found[name] = part[start : start + numbers].view(shape)
                start += numbers
        return found


FLAGS = 2
"""Numbers before the gradients that a rank sends: whether it has failed, and whether one of its
gradients is not finite."""


def _fill(buffer: Tensor, sizes: Mapping[str, int], values: Mapping[str, Tensor]) -> None:
    """Write values one after the other; zeros stay where there is none."""
    start = 0
    for name, numbers in sizes.items():
        if name in values:
            buffer[start : start + numbers].copy_(values[name].reshape(-1))
        start += numbers
