"""Row counts that an emitting graph returns, by the groups of the blocks that they are of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kfc_fx.plan.spec import BlockSpec

Span = tuple[int, int]


def counts_of_spans(
    blocks: Sequence[BlockSpec], spans: Sequence[Span], rows: Sequence[int | Tensor]
) -> tuple[list[BlockSpec], list[Span], list[int]]:
    """Split the sites whose groups differ in their rows.

    Args:
        blocks, spans, rows: for each site its block, the groups ``[start, stop)`` of it, and
            N·|T|: one number for all of these, or a tensor of one for each.

    Returns:
        The same with numbers alone. Reading a tensor waits for its device.
    """
    found: list[tuple[BlockSpec, Span, int]] = []
    for block, (start, stop), count in zip(blocks, spans, rows, strict=True):
        if isinstance(count, Tensor):
            groups = zip(range(start, stop), count.tolist(), strict=True)
            found += [(block, (group, group + 1), own) for group, own in groups]
        else:
            found.append((block, (start, stop), count))
    return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]
