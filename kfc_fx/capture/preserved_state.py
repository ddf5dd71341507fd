"""Run a model to look at it, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def state_preserved(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random number generators afterwards.

    Buffers that the forward pass registers are taken away again, and those that it replaces, such
    as a cache that grows, are put back.
    """
    before = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
    ]
    values = {
        buffer: buffer.clone()
        for _, buffers, _ in before
        for buffer in buffers.values()
        if buffer is not None and not is_lazy(buffer)
    }
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for module, buffers, non_persistent in before:
                module._buffers.clear()
                module._buffers.update(buffers)
                module._non_persistent_buffers_set.clear()
                module._non_persistent_buffers_set.update(non_persistent)
            for buffer, value in values.items():
                buffer.copy_(value)
