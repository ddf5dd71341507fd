"""Make the sums of one step fit for the EMA: complete, and finite or dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfc_fx.codegen.spec import StackSpec
from kfc_fx.engine.host_numbers import stack_columns
from kfc_fx.statistics.sums import Sums


@dataclass(frozen=True)
class ScreenedStatistics:
    """Arguments of the generated ``accumulate``, and the blocks that were dropped."""

    sums: Mapping[str, Tensor]
    """Sums by "block.factor", zero where absent or dropped."""
    examples: int
    rows: Mapping[str, Tensor]
    """N·|T| by stack, ``[depth, 1, 1]``; one where absent."""
    rate: Mapping[str, Tensor]
    """Weight of the new value by stack, ``[depth, 1, 1]``; zero where absent or dropped."""
    dropped: Sequence[str]


def screen(
    statistics: Sums, stacks: Sequence[StackSpec], rate_of: Callable[[str], float]
) -> ScreenedStatistics:
    """Fill in absent blocks, drop blocks with a statistic that is not finite.

    Args:
        stacks: those that get statistics.
        rate_of: key of a stack to the weight of its new value in the moving average.
    """
    finite = _finite_blocks(statistics)
    sums: dict[str, Tensor] = {}
    rows: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for stack in stacks:
        rate = rate_of(stack.key)
        row_counts, row_rates = rows.setdefault(stack.key, []), rates.setdefault(stack.key, [])
        for block in stack.blocks:
            counts = statistics.rows.get(block.name, [0] * block.groups)
            live = finite.get(block.name, False) and any(counts)
            for factor, shape in stack.factor_shapes.items():
                value = statistics.blocks[block.name][factor] if live else None
                count = block.groups * stack.parts[factor]
                sums[f"{block.name}.{factor}"] = _or_zeros(value, count, shape, stack)
            row_counts += [float(max(count, 1)) for count in counts]
            row_rates += [rate if live and count else 0.0 for count in counts]
    dropped = [name for name, fine in finite.items() if not fine]
    return ScreenedStatistics(
        sums,
        max(statistics.examples, 1),
        stack_columns(rows, stacks),
        stack_columns(rates, stacks),
        dropped,
    )


def _finite_blocks(statistics: Sums) -> dict[str, bool]:
    """Whether all sums of each block are finite; one synchronisation for all of them."""
    names = list(statistics.blocks)
    if not names:
        return {}
    traces = [sum(_trace(value) for value in sums.values()) for sums in statistics.blocks.values()]
    flags = torch.stack([trace.to(traces[0].device) for trace in traces]).isfinite().tolist()  # type: ignore[union-attr]
    return dict(zip(names, flags, strict=True))


def _trace(factor: Tensor) -> Tensor:
    """Finite exactly where every entry of a Gram matrix can be; of a diagonal factor, its sum."""
    square = factor.shape[-1] == factor.shape[-2]
    return factor.diagonal(dim1=-2, dim2=-1).sum() if square else factor.sum()


def _or_zeros(value: Tensor | None, count: int, shape: tuple[int, ...], stack: StackSpec) -> Tensor:
    dtype = getattr(torch, stack.dtype)
    if value is None:
        return torch.zeros((count, *shape[1:]), dtype=dtype, device=stack.device)
    return value.to(stack.device, dtype)
