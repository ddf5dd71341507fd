"""Who asks for a state dict, or loads one."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Literal

CHECKPOINT = "torch.distributed.checkpoint"

Asked = Literal["parts", "whole", "from rank 0"]


def asked_by_checkpoint() -> Asked | None:
    """What ``torch.distributed.checkpoint`` wants, where it asks, on all ranks together: the parts
    of all ranks, the whole of each parameter, or to load from one rank. None for anybody else."""
    frame: FrameType | None = sys._getframe(1)
    found: Asked | None = None
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(CHECKPOINT):
            options = frame.f_locals.get("info")
            if getattr(options, "broadcast_from_rank0", False):
                return "from rank 0"
            if getattr(options, "full_state_dict", False):
                return "whole"
            found = "parts"
        frame = frame.f_back
    return found
