"""Process groups of several ranks."""

from __future__ import annotations

import torch

from kfc_fx.errors import OptionError


def refuse_several_processes() -> None:
    """Raise :class:`OptionError` in a process group of more than one rank: each rank has the
    statistics of its own batch, so that replicas would drift apart."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise OptionError(
                f"KFC does not train on several processes yet, and this process group has {ranks} "
                "ranks: each would take its own factors, and the replicas would drift apart. Train "
                "in one process, or by an optimizer of torch.optim"
            )
