"""What the ranks compare before a step with statistics, by one collective."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.errors import StepError

MOST_NAMED = 4
"""Differences that a message names."""


@dataclass(frozen=True)
class Compared:
    """One thing that is the same on all ranks, or else no step is taken.

    Attributes:
        digest: a number that differs where the thing does.
        details: names to values, of which a message has those that differ.
        hint: what to do where it is not.
    """

    name: str
    digest: int
    details: Callable[[], Mapping[str, object]]
    hint: str


@dataclass(frozen=True)
class Standing:
    """What a rank knows before a step with statistics.

    Attributes:
        compared: what must be the same; the first that differs is named.
        exchanged: digests of what may differ, and is then made one, by name.
        flags: what is asked for on any rank, by name.
    """

    compared: Sequence[Compared] = ()
    exchanged: Mapping[str, int] | None = None
    flags: Mapping[str, bool] | None = None


@dataclass(frozen=True)
class Agreement:
    """What the ranks have learned: names of exchanged things that differ, and of flags that are set
    on some rank."""

    differing: frozenset[str]
    flagged: frozenset[str]


def agreed(
    ranks: Ranks, attempt: Attempt, standing: Standing, names: Sequence[Sequence[str]]
) -> Agreement:
    """Compare the standings of all ranks.

    Args:
        names: of what is compared, exchanged and flagged, which a rank that failed before it had a
            standing knows too.

    Raises:
        StepError: something has failed on another rank; or ranks differ in what must be the same.
    """
    compared, exchanged, flags = names
    own = {item.name: item.digest for item in standing.compared}
    own |= standing.exchanged or {}
    own |= {name: int(value) for name, value in (standing.flags or {}).items()}
    columns = [*compared, *exchanged, *flags]
    row = [int(attempt.failed), *(own.get(name, 0) for name in columns)]
    rows = ranks.gather(torch.tensor(row, dtype=torch.int64)).cpu()
    attempt.settle(rows[:, 0].nonzero()[:, 0].tolist())
    found = dict(zip(columns, rows[:, 1:].unbind(1), strict=True))
    for item in standing.compared:
        if bool((found[item.name] != found[item.name][0]).any()):
            attempt.told = True
            raise StepError(_difference(ranks, item))
    return Agreement(
        frozenset(n for n in exchanged if bool((found[n] != found[n][0]).any())),
        frozenset(n for n in flags if bool(found[n].any())),
    )


def _difference(ranks: Ranks, item: Compared) -> str:
    everywhere = ranks.gather_objects({k: str(v) for k, v in item.details().items()})
    first = everywhere[0]
    lines = []
    for rank, details in enumerate(everywhere):
        for name in dict.fromkeys([*first, *details]):
            one, other = first.get(name, "nothing"), details.get(name, "nothing")
            if one != other:
                lines.append(f"{name} is {one} on rank 0 and {other} on rank {rank}")
    more = f"; and {len(lines) - MOST_NAMED} more" if len(lines) > MOST_NAMED else ""
    return f"ranks differ in their {item.name}: {'; '.join(lines[:MOST_NAMED])}{more}. {item.hint}"


def digest(text: str) -> int:
    """A number of 63 bits that stands for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> int:
    """A number of 63 bits that stands for the names and all bits of tensors; one wait for each
    device."""
    sums: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors.items():
        own = bits_of(tensor) * (digest(name) | 1)  # modulo 2⁶⁴, as sums of integers are
        sums.setdefault(tensor.device, []).append(own)
    total = sum(int(torch.stack(own).sum()) for own in sums.values())
    return digest(f"{total % 2**64} {len(tensors)}")


def bits_of(tensor: Tensor) -> Tensor:
    """The sum of a tensor's numbers, read as integers of their size."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    own = tensor.detach()
    return own.view(kinds[own.element_size()]).sum(dtype=torch.int64)
