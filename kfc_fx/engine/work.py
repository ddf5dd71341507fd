"""The work of a step's parts, counted from shapes: floating-point operations of products and
decompositions, two for each multiply-add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.plan.spec import BlockSpec
from kfc_fx.statistics.share import BatchShare

Rows = Mapping[str, Sequence[int]]
"""Output rows N·|T| of a batch by block, of each of its groups."""

EIGH, QR, PRODUCT = 9.0, 8 / 3, 2.0
"""Operations by side³ (Golub & Van Loan, sections 8.3 and 5.2; QR with Q formed)."""


@dataclass(frozen=True)
class StackWork:
    """Operations of one step with statistics and a refresh, for one stack."""

    statistics: float
    """Of the sums of a batch."""
    refresh: float
    """Of their way into the factors, and of what is made of these."""

    @property
    def total(self) -> float:
        """Both."""
        return self.statistics + self.refresh


def fisher_pass_flops(spec: UpdateSpec, rows: Rows, share: BatchShare) -> float:
    """Operations of the backward pass of sampled targets in the layers of blocks: gradients of
    inputs alone.

    Args:
        rows: of the whole batch; blocks without any count for nothing.
        share: of the batch, that the pass is of.
    """
    blocks = (block for stack in spec.stacks for block in stack.blocks)
    return share.fraction * sum(_layer_flops(block, rows) for block in blocks)


def stack_work(spec: UpdateSpec, stack: StackSpec, rows: Rows, share: BatchShare) -> StackWork:
    """The work of one stack at a step with statistics and a refresh.

    Args:
        rows: of the whole batch.
        share: of the batch, that statistics are estimated from.
    """
    statistics = sum(_statistics_flops(stack, block, rows, share) for block in stack.blocks)
    return StackWork(statistics, refresh_flops(spec, stack))


def _layer_flops(block: BlockSpec, rows: Rows) -> float:
    if not block.layer.is_matrix:
        return 0.0
    return PRODUCT * sum(rows.get(block.name, ())) * block.rows * block.columns


def _statistics_flops(stack: StackSpec, block: BlockSpec, rows: Rows, share: BatchShare) -> float:
    whole = sum(rows.get(block.name, ()))
    own, found = share.fraction * whole, 0.0
    for factor, shape in stack.factor_shapes.items():
        taken = own
        if factor != "gamma" and block.locations > 1:
            least = share.least * block.locations * block.groups
            taken = min(own, max(least, share.rows * block.columns * block.groups))
        found += PRODUCT * taken * stack.parts[factor] * prod(shape[1:])
    return found


def refresh_flops(spec: UpdateSpec, stack: StackSpec) -> float:
    """Operations of one refresh of a stack, and of the way of statistics into its factors."""
    generator = stack.scaling.generator
    in_basis = spec.factors_in_basis_of(stack)
    found = 0.0
    for factor, (count, *_, side) in stack.basis_shapes.items():
        follows = generator.KEEPS_BASES and side >= spec.orthogonal_iteration_from
        each = PRODUCT + QR if follows else EIGH
        if factor in in_basis:
            each += 2 * PRODUCT  # written out, and its diagonal in the new basis
        found += count * each * side**3
        if generator.KEEPS_BASES:
            turns = PRODUCT * side**3 * count
            moments = 2 * PRODUCT * prod(stack.matrix_shape) * side
            found += turns + moments
    return found
