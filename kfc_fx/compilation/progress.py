"""A line of a first call that takes long, which is that of capturing."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PATIENCE = 2.0
"""Seconds of a first call after which it says what it does."""
logger = logging.getLogger("kfc_fx")


@contextmanager
def told_of_capture(name: str, outcome: Callable[[], str]) -> Iterator[None]:
    """Say that a model is being captured, once that has taken :data:`PATIENCE` seconds, and what
    came of it: on stderr where that is a terminal, else to the logger ``kfc_fx`` as INFO.

    Args:
        name: of the model's class.
        outcome: what was captured, asked after the body; empty where nothing was.
    """
    start = time.monotonic()
    line = f"kfc_fx: capturing {name}; its first call does so, and later ones do not"
    timer = threading.Timer(PATIENCE, _say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    seconds = time.monotonic() - start
    if seconds > PATIENCE:
        timer.join()
        found = ""
        with suppress(Exception):  # which who asks for the plan will see
            found = outcome()
        if found:
            _say(f"kfc_fx: captured {name} in {seconds:.1f} s: {found}")


def _say(line: str) -> None:
    stream = sys.stderr
    with suppress(AttributeError, OSError, ValueError):  # of what stands in for a terminal
        if stream.isatty():
            print(line, file=stream, flush=True)
            return
    logger.info(line.removeprefix("kfc_fx: "))
