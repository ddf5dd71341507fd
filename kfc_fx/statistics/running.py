"""The armed forward passes that run, innermost last.

Statistics of a layer's input are taken in the forward pass, beside the layer. What share of the
batch they are of is a fact of the pass and not of the graph. The stack is one of each thread, in
which a forward pass runs from its beginning to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kfc_fx.statistics.share import WHOLE, BatchShare

ShareOf = Callable[[str, bool], BatchShare | None]
"""Block name, and whether code is traced that other passes run too, to the share of the batch that
its statistics are taken of; None for a block whose statistics are not wanted, but in such code."""


class _Running(threading.local):
    def __init__(self) -> None:
        self.shares: list[ShareOf] = []


_running = _Running()


@contextmanager
def forward_shares(share_of: ShareOf) -> Iterator[None]:
    """While it lasts, statistics that are taken in the forward pass are of these shares."""
    _running.shares.append(share_of)
    try:
        yield
    finally:
        _running.shares.remove(share_of)


def forward_share(block: str, *, traced: bool) -> BatchShare | None:
    """The share of the batch that the innermost forward pass takes the statistics of a block of;
    None where it takes none.

    Args:
        traced: whether code is traced, which later passes run too, with the same share of the
            batch, and with statistics of other blocks.
    """
    return _running.shares[-1](block, traced) if _running.shares else WHOLE
