"""One tensor of the update's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StateEntry:
    """Shape of one stacked state tensor and what it starts from."""

    shape: tuple[int, ...]
    initial: Literal["zeros", "ones", "identity"]
