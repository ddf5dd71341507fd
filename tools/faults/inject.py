"""Faults at a numbered place: an op, or a line of Python."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """Counts the ops that run, and raises in place of one of them. Ops that write lists of tensors
    in place are let through: they take no memory, and are the writes to the parameters.

    Args:
        at: number of the op, from zero; None to count alone.
        error: what is raised.
    """

    def __init__(self, at: int | None = None, error: Exception | None = None) -> None:
        super().__init__()
        self.count, self._at, self._error = 0, at, error

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_foreach") and name.endswith("_"):
            return func(*args, **(kwargs or {}))
        number, self.count = self.count, self.count + 1
        if number == self._at and self._error is not None:
            raise self._error
        return func(*args, **(kwargs or {}))


@contextmanager
def interrupt_at(line: int | None) -> Iterator[list[int]]:
    """Send SIGINT when a numbered line of Python is about to run, as Ctrl-C may.

    Args:
        line: number from zero, of the lines that run in the body; None to count alone.

    Yields:
        A list of one number, the lines so far.
    """
    count = [0]

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line":
            number, count[0] = count[0], count[0] + 1
            if number == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    before, handler = sys.gettrace(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGINT, handler)


def out_of_memory() -> Exception:
    """As an allocator raises it."""
    return torch.OutOfMemoryError("out of memory, put there by a test")
