"""What a parameter's entry of the state says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

UNIT = 1024
"""Bytes that a note is padded to a multiple of: ``torch.distributed.checkpoint`` loads into tensors
that have their sizes already."""

ROOM = 700
"""Bytes for the names of entries, which grow in number as a run goes on."""


@dataclass(frozen=True)
class Note:
    """Beside the tensors of a parameter in ``opt.state``, as a tensor of bytes: trainers and
    checkpoints hand tensors on, and many hand on nothing else."""

    model: int
    """Number of the parameter's model among the optimizer's."""
    name: str
    """Of the parameter in it."""
    held: tuple[str, ...]
    """Names of the entries that hold something; others wait for the first step that needs them."""
    columns: tuple[str, ...]
    """Entries whose matrices lie in memory column by column. A product rounds by the layout."""
    block: dict[str, Any] | None
    """The block that the parameter is the weight of, as plain data."""
    parked: bool
    """Whether the block has no place in the update, as of a layer that was long frozen."""

    def encoded(self, device: torch.device) -> Tensor:
        """As text, in a tensor of bytes."""
        fixed = json.dumps({**asdict(self), "held": (), "columns": ()}).encode()
        size = -(-(len(fixed) + ROOM) // UNIT) * UNIT
        padded = json.dumps(asdict(self)).encode().ljust(size)
        return torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(device)

    @classmethod
    def decoded(cls, note: Tensor) -> Note:
        """The inverse of :meth:`encoded`.

        Raises:
            ValueError: it is no note.
        """
        found = json.loads(bytes(note.to("cpu", torch.uint8).tolist()))
        if not isinstance(found, dict):
            raise ValueError(f"a note is a table, and this is {type(found).__name__}")
        known = {field.name: found[field.name] for field in fields(cls)}
        return cls(**known | {name: tuple(found[name]) for name in ("held", "columns")})
