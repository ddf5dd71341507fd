"""Replicas of a model in threads, as ``nn.DataParallel`` makes them."""

from __future__ import annotations

import sys

from torch import nn

from kfc_fx.errors import OptionError

_CALL = nn.Module._wrapped_call_impl.__code__


def refuse_replicas(model: nn.Module) -> None:
    """Raise :class:`OptionError` where what is called is not the model itself, but a shallow copy,
    which has taken over whatever is called in the model's place: the parameters of the model would
    be used, and not those of the copy.
    """
    frame = sys._getframe(2)  # of whoever called the function that asks
    if frame.f_code is not _CALL:
        return
    called = frame.f_locals["self"]
    if called is model:
        return
    if getattr(called, "_is_replica", False):
        raise OptionError(
            "nn.DataParallel calls replicas of the model, whose statistics kfc_fx does not take: "
            "train on one device, by nn.DataParallel(model, device_ids=[0]) or without it"
        )
    raise OptionError(
        "a shallow copy of a compiled model was called, which holds the calls of the model that it "
        "was made from: use copy.deepcopy, or kfc_fx.uncompile the model before it is copied"
    )
