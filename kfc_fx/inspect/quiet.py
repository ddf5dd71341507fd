"""Silence of torch's logs where a failure is expected and is told in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_logs() -> Iterator[None]:
    """While it lasts, nothing below a critical error is logged, in the whole process.

    torch logs the traceback of an operator that refuses a fake tensor, and raises as well.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
