"""The processes that train one model together, and their collectives."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from kfc_fx.errors import OptionError, StepError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = 2.0
"""Seconds for which ranks are waited for before somebody asks whether one has failed."""
POLL = 5e-5


class Ranks:
    """The ranks of a process group, as one optimizer sees them.

    Collectives go through a group of their own, so that their order against those of ``DDP`` does
    not matter. It is made at the first collective, which all ranks reach together.

    Args:
        given: a process group; None for that of all processes, where there are several; False for
            this process alone.

    Raises:
        OptionError: it is none of these, or a group that this process is not in.
    """

    def __init__(self, given: Any = None) -> None:
        self._given = given
        self._own: dist.ProcessGroup | None = None
        self._told: set[int] = set()
        self._broken = ""
        if given is None or given is False:
            return
        known = dist.is_available()
        if known and given == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returned
            raise OptionError("process_group: this process is not in the group")
        if not (known and isinstance(given, dist.ProcessGroup)):
            raise OptionError(
                "process_group must be a group of torch.distributed, None for all processes or "
                f"False for this one alone; got {type(given).__name__}"
            )

    @property
    def given(self) -> Any:
        """What they were made from."""
        return self._given

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    @property
    def count(self) -> int:
        """How many there are: one before ``init_process_group``."""
        return dist.get_world_size(self._group) if self._is_grouped else 1

    @property
    def rank(self) -> int:
        """The number of this one among them."""
        return dist.get_rank(self._group) if self._is_grouped else 0

    @property
    def members(self) -> tuple[int, ...]:
        """They as numbers among all processes."""
        if not self._is_grouped:
            return (dist.get_rank() if dist.is_available() and dist.is_initialized() else 0,)
        return tuple(dist.get_process_group_ranks(self._group or dist.group.WORLD))

    @property
    def device(self) -> torch.device:
        """Where tensors are that collectives take."""
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def _is_grouped(self) -> bool:
        known = dist.is_available() and dist.is_initialized()
        return known and self._given is not False

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self._given is None else self._given

    @property
    def _collectives(self) -> dist.ProcessGroup:
        if self._broken:
            raise StepError(self._broken)
        if self._own is None:
            made = dist.new_group(
                list(self.members), timeout=self._patience, use_local_synchronization=True
            )
            self._own = cast(dist.ProcessGroup, made)
        return self._own

    @property
    def _patience(self) -> timedelta | None:
        """For how long the user's group waits, which a new group would not know; None for a backend
        that has no such time."""
        group: Any = self._group or dist.group.WORLD
        return getattr(group._get_backend(self.device).options, "_timeout", None)

    def mesh(self) -> DeviceMesh:
        """They as a mesh of one dimension."""
        from torch.distributed.device_mesh import DeviceMesh

        group = cast(dist.ProcessGroup, self._group or dist.group.WORLD)
        return DeviceMesh.from_group(group, self.device.type)

    # -- collectives -------------------------------------------------------------------------

    def add(self, buffer: Tensor) -> Tensor:
        """The sum of a buffer over the ranks, in place where the backend takes its device."""
        moved = buffer.to(self.device)
        self._wait(dist.all_reduce(moved, group=self._collectives, async_op=True))
        return moved.to(buffer.device)

    def gather(self, buffer: Tensor) -> Tensor:
        """Buffers ``[n]`` of all ranks, ``[ranks, n]``."""
        moved = buffer.to(self.device)
        found = moved.new_empty(self.count * len(moved))
        self._wait(_all_gather(found, moved, group=self._collectives, async_op=True))
        return found.unflatten(0, (self.count, -1)).to(buffer.device)

    def gather_parts(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Buffers of other sizes from each rank, by what sends less: all padded to the longest, or
        their sum in one buffer, where each has a place of its own.

        Args:
            own: of this rank, ``[sizes[rank]]``.
        """
        longest, total = max(sizes), sum(sizes)
        if pads(sizes):
            padded = own.new_zeros(longest)
            padded[: len(own)] = own
            parts = self.gather(padded)
            return [part[:size] for part, size in zip(parts, sizes, strict=True)]
        whole = own.new_zeros(total)
        whole.split(list(sizes))[self.rank].copy_(own)
        return list(self.add(whole).split(list(sizes)))

    def exchange(self, buffer: Tensor, sizes: list[int], expected: list[int]) -> Tensor:
        """What all ranks have for this one, in their order, for what this one has for each.

        Args:
            sizes: how much of the buffer is for each rank; ``expected``: how much comes from each.
        """
        moved = buffer.to(self.device)
        found = moved.new_empty(sum(expected))
        group = self._collectives
        self._wait(dist.all_to_all_single(found, moved, expected, sizes, group, async_op=True))
        return found.to(buffer.device)

    def gather_objects(self, own: Any) -> list[Any]:
        """Plain data of all ranks, in their order."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, own, group=self._collectives)
        return found

    def gather_objects_on(self, rank: int, own: Any) -> list[Any]:
        """Plain data of all ranks, in their order, on one of them; nothing on the others."""
        found: list[Any] | None = [None] * self.count if self.rank == rank else None
        dist.gather_object(own, found, group=self._collectives, group_dst=rank)
        return found or []

    def tell(self, step: int, error: BaseException) -> None:
        """Leave word of a failure that no collective has told of, for ranks that wait for this one.

        Args:
            step: how many steps this rank had taken.
        """
        if self._own is None or self._broken:
            return  # nobody waits for this rank yet, or any more
        self._told.add(step)
        text = json.dumps([step, f"{type(error).__name__}: {error}"])
        self._store.set(f"failed/{self.rank}", text)

    def note_agreement(self) -> None:
        """All ranks have compared and are alike: what has failed before is over."""
        if self._told:
            self._told.clear()
            self._store.delete_key(f"failed/{self.rank}")

    def begin_anew(self) -> None:
        """Another state was loaded, on all ranks: they meet in a new group, in which no collective
        of before is waited for."""
        self._own, self._broken = None, ""
        self._told.clear()

    def _wait(self, work: Any) -> None:
        """Wait for the other ranks, as long as none has failed.

        Raises:
            StepError: one has; or the collective has.
        """
        started = looked = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            if now - started > PATIENCE and now - looked > PATIENCE / 4:
                looked = now
                self._look_for_failures(now - started)
            time.sleep(POLL if now - started < PATIENCE else 100 * POLL)
        try:
            work.wait()
        except RuntimeError as error:
            self._broken = (
                f"rank {self.rank} has waited {time.monotonic() - started:.0f} s for the other "
                f"ranks, in vain: {error}"
            )
            raise StepError(self._broken) from error

    def _look_for_failures(self, waited: float) -> None:
        for rank in range(self.count):
            if rank == self.rank:
                continue
            found = self._told_by(rank)
            if found is not None and found[0] not in self._told:  # else it was the same on both
                step, text = found
                self._stop(
                    f"rank {rank} has failed after {step} steps while the others went on, so that "
                    f"the replicas differ: {text}"
                )
            alone = self._told and (found is None or found[0] not in self._told)
            if alone and waited > 5 * PATIENCE:
                self._stop(
                    f"this rank, {self.rank}, has failed after {max(self._told)} steps while rank "
                    f"{rank} went on, so that the replicas differ"
                )

    def _told_by(self, rank: int) -> tuple[int, str] | None:
        """The last failure that a rank has left word of: after how many steps, and what."""
        key = f"failed/{rank}"
        if not self._store.check([key]):
            return None
        step, text = json.loads(self._store.get(key))
        return step, text

    def _stop(self, why: str) -> None:
        self._broken = f"{why}. Load a checkpoint on all ranks"
        raise StepError(self._broken)

    @property
    def _store(self) -> Any:
        c10d: Any = dist.distributed_c10d
        name = self._collectives.group_name  # the same on all ranks
        return c10d.PrefixStore(f"kfc_fx/{name}", c10d._get_default_store())


def _all_gather(found: Tensor, own: Tensor, **options: Any) -> Any:
    """Under its newer name, where torch has that: the older one warns then."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    return getattr(dist, name)(found, own, **options)


def pads(sizes: Sequence[int]) -> bool:
    """Whether parts of these sizes are gathered as equal ones: a sum sends everything twice."""
    return len(sizes) * max(sizes) <= 2 * sum(sizes)
