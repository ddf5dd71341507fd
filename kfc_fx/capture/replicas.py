"""Replicas of a model in threads, as ``nn.DataParallel`` makes them."""

from __future__ import annotations

import sys

from torch import nn

from kfc_fx.errors import OptionError

_CALL = nn.Module._wrapped_call_impl.__code__


def refuse_replicas(model: nn.Module) -> None:
    """Raise :class:`OptionError` where what is called is not the model itself, but a replica, which
    has taken over what is called in the model's place: the parameters of the model would be used,
    and not those of the replica.
    """
    frame = sys._getframe(2)  # of whoever called the function that asks
    if frame.f_code is not _CALL:
        return
    if frame.f_locals["self"] is not model:
        raise OptionError(
            "nn.DataParallel calls replicas of the model, whose statistics kfc_fx does not take: "
            "train on one device, by nn.DataParallel(model, device_ids=[0]) or without it"
        )
