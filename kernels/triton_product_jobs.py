"""What one launch of the structured kernel does: jobs, and the parts that they are cut into.

The slots of one kind (a pair of phases and a shift) differ only in their boxes of pixels. Cut the
boxes into disjoint elementary boxes: each is a *job*, multiplied once, and a slot is the sum of
the jobs in its box. There is no subtraction, so nothing cancels. Long jobs are cut again along K
into *parts* of about equal length, one program for each tile of each part.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from kfc_fx.kernels.products import (
    AxisProduct,
    Product,
    ProductPlan,
    elementary_segments,
    segments_within,
)

MAX_SPATIAL = 3

Kind = tuple[tuple[int, int, int], ...]
Segment = tuple[int, int]


@dataclass(frozen=True)
class ProductJob:
    """``Σ_n Σ_{q in box} X[first + s·q] X[second + s·q]ᵀ``.

    ``kind`` gives each axis' phase, other phase and shift; ``box`` its interval of q.
    """

    kind: Kind
    box: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)  # hashed by identity, as the plans that they are cached for
class JobPlan:
    """The jobs of a plan, and the jobs that each slot adds up."""

    jobs: tuple[ProductJob, ...]
    jobs_of_slot: tuple[tuple[int, ...], ...]
    symmetric: tuple[bool, ...]


@dataclass(frozen=True)
class Part:
    """A range of K steps of one job; ``target`` is where its product is stored."""

    first: int
    second: int
    box_height: int
    box_width: int
    first_step: int
    last_step: int
    target: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """All parts, and for each slot that is not written directly the targets that it adds up.

    Targets count from the slots: ``target < slots`` is a slot itself, others are partial sums.
    """

    parts: tuple[Part, ...]
    slots: int
    targets: int
    sums: tuple[tuple[int, tuple[int, ...]], ...]


@lru_cache(maxsize=512)
def job_plan(plan: ProductPlan) -> JobPlan:
    """Cut the slots' boxes into jobs, which slots of one kind share."""
    by_kind: dict[Kind, list[Product]] = {}
    for slot in plan.slots:
        by_kind.setdefault(_kind(slot), []).append(slot)
    numbers: dict[ProductJob, int] = {}
    jobs_of_slot: dict[Product, tuple[int, ...]] = {}
    for kind, slots in by_kind.items():
        segments = [
            elementary_segments(sorted({_interval(slot[axis]) for slot in slots}))
            for axis in range(len(kind))
        ]
        for slot in slots:
            jobs_of_slot[slot] = tuple(
                numbers.setdefault(ProductJob(kind, box), len(numbers))
                for box in _boxes(slot, segments)
            )
    return JobPlan(
        tuple(numbers),
        tuple(jobs_of_slot[slot] for slot in plan.slots),
        tuple(all(a == b and shift == 0 for a, b, shift in _kind(slot)) for slot in plan.slots),
    )


def _kind(slot: Product) -> Kind:
    return tuple(axis.kind for axis in slot)


def _interval(axis: AxisProduct) -> Segment:
    return axis.start, axis.stop


def _boxes(slot: Product, segments: list[list[Segment]]) -> list[tuple[Segment, ...]]:
    inside = [
        [found[i] for i in segments_within(_interval(axis), found)]
        for axis, found in zip(slot, segments, strict=True)
    ]
    return list(itertools.product(*inside))


def job_steps(job: ProductJob, padded_batch: int, block_k: int) -> int:
    """K steps of a job: each line of its box is covered by whole steps."""
    lengths = [stop - start for start, stop in job.box] or [1]
    return prod(lengths[:-1]) * -(-lengths[-1] * padded_batch // block_k)


@lru_cache(maxsize=512)
def total_steps(jobs: JobPlan, padded_batch: int, block_k: int) -> int:
    """K steps of all jobs."""
    return sum(job_steps(job, padded_batch, block_k) for job in jobs.jobs)


@lru_cache(maxsize=512)
def product_schedule(
    jobs: JobPlan,
    stride: tuple[int, ...],
    spatial: tuple[int, ...],
    padded_batch: int,
    block_k: int,
    steps_per_part: int,
) -> Schedule:
    """Cut the jobs into parts of at most ``steps_per_part`` and say where each is stored.

    A slot that one part makes is written by it directly, unless it is symmetric: those are
    written by the second reduction, which mirrors them.
    """
    users: list[int] = [0] * len(jobs.jobs)
    for used in jobs.jobs_of_slot:
        for number in used:
            users[number] += 1
    direct = {
        used[0]: slot
        for slot, used in enumerate(jobs.jobs_of_slot)
        if len(used) == 1 and users[used[0]] == 1 and not jobs.symmetric[slot]
    }
    parts: list[Part] = []
    targets_of_job: list[tuple[int, ...]] = []
    targets = len(jobs.jobs_of_slot)
    for number, job in enumerate(jobs.jobs):
        steps = job_steps(job, padded_batch, block_k)
        count = -(-steps // steps_per_part)
        if count == 1 and number in direct:
            own: tuple[int, ...] = (direct[number],)
        else:
            own = tuple(range(targets, targets + count))
            targets += count
        targets_of_job.append(own)
        parts.extend(_parts(job, stride, spatial, steps, own))
    sums = tuple(
        (slot, tuple(target for job in used for target in targets_of_job[job]))
        for slot, used in enumerate(jobs.jobs_of_slot)
    )
    # The longest first, so that the last programs of the launch are short ones.
    parts.sort(key=lambda part: part.first_step - part.last_step)
    pending = tuple((slot, own) for slot, own in sums if own != (slot,))
    return Schedule(tuple(parts), len(jobs.jobs_of_slot), targets, pending)


def _parts(
    job: ProductJob,
    stride: tuple[int, ...],
    spatial: tuple[int, ...],
    steps: int,
    targets: tuple[int, ...],
) -> list[Part]:
    first = second = 0
    for (phase, other, shift), (start, _), step, size in zip(
        job.kind, job.box, stride, spatial, strict=True
    ):
        first = first * size + phase + step * start
        second = second * size + other + step * (start + shift)
    lengths = (1,) * (MAX_SPATIAL - len(job.box)) + tuple(stop - start for start, stop in job.box)
    each = -(-steps // max(1, len(targets)))
    return [
        Part(first, second, lengths[1], lengths[2], i * each, min(steps, (i + 1) * each), target)
        for i, target in enumerate(targets)
    ]
