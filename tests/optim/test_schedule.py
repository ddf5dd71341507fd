"""When statistics and refreshes are due, and how much each statistic counts."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import kfc_fx
from kfc_fx.optim.schedule import (
    GROWTH,
    LEVELS,
    WINDOW,
    Schedule,
    averaging_rate,
    due_steps,
    most_in_window,
    thinned,
)
from tests.models import IMAGES, LABELS, collector_of, make


def due(schedule: Schedule, steps: int) -> list[int]:
    return [step for step in range(steps) if schedule.statistics_due(step)]


def test_intervals_grow_to_their_length_and_stay():
    schedule = Schedule(every=10, refresh_every=10)
    assert due(schedule, 80) == [*range(9), 10, 12, 15, 18, 22, 27, 33, 40, 50, 60, 70]
    assert schedule.early_phase == 40


def test_statistics_and_refreshes_have_their_own_intervals():
    schedule = Schedule(every=2, refresh_every=10)
    refreshes = [step for step in range(60) if schedule.refresh_due(step)]
    assert due(schedule, 14) == [*range(9), 10, 12]
    assert refreshes == due(Schedule(10, 10), 60)
    assert schedule.early_phase == 40


def test_a_long_interval_costs_few_early_steps():
    early = [step for step in sorted(due_steps(1000, 0)) if step < GROWTH * 1000]
    assert len(early) < 40
    gaps = [b - a for a, b in pairwise(early[8:])]
    assert all(gap <= step / 4 for gap, step in zip(gaps, early[8:], strict=False))


@settings(deadline=None)
@given(
    interval=st.integers(1, 120),
    first=st.integers(0, 25),
    most=st.integers(1, WINDOW),
)
def test_a_stack_is_due_no_more_often_than_it_may_be(interval, first, most):
    dense, kept = due_steps(interval, first), thinned(interval, first, most)
    assert 0 in kept
    assert kept <= dense  # no steps of its own, so that few sets of stacks are due together
    regular = -(-WINDOW // interval)
    assert kept == dense or most_in_window(kept) <= max(most, regular, LEVELS[0])
    gaps = [b - a for a, b in pairwise(sorted(kept))]
    assert max(gaps, default=0) <= 2 * max(interval, WINDOW)


def test_stacks_are_due_apart_until_the_early_phase_ends():
    schedule = Schedule(20, 20, most={"cheap": 13, "dear": 2})
    dear = [step for step in range(200) if schedule.statistics_due(step, "dear")]
    assert due(schedule, 80) == due(Schedule(20, 20), 80)
    assert dear[:3] == [0, 4, 22]
    assert schedule.early_phase == 100
    assert [step for step in range(100, 200) if schedule.refresh_due(step, "dear")] == [
        *range(100, 200, 20)
    ]
    assert schedule.left_out(9, "dear") == 7
    assert schedule.left_out(9, "cheap") == 0
    assert schedule.statistics_due(3, "of no bound")


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_short_intervals_are_kept(interval):
    found = due(Schedule(interval, interval), 30)
    assert set(range(0, 30, interval)) <= {*found, *range(4 * interval)}
    assert found[-1] >= 30 - interval


def test_inverse_begins_with_twenty_steps():
    schedule = Schedule(10, 10, kfc_fx.Inverse.first_steps)
    assert due(schedule, 51) == [*range(20), 22, 27, 33, 40, 50]
    assert all(schedule.refresh_due(step) for step in range(20))
    assert Schedule(1, 1, kfc_fx.Adam.first_steps).early_phase == 4
    assert Schedule(1, 1, kfc_fx.Inverse.first_steps).early_phase == 20


def test_the_scaling_of_one_block_is_enough_for_its_first_steps():
    _, opt = make(blocks={"0": "inverse"}, every=10, refresh_every=15)
    assert opt.schedule == Schedule(10, 15, 20)


def test_weights_of_few_statistics_grow_linearly():
    weights = []
    for count in range(12):
        rate = averaging_rate(count, 0.95)
        weights = [weight * (1 - rate) for weight in weights] + [rate]
    assert weights == pytest.approx([2 * (n + 1) / (12 * 13) for n in range(12)])
    assert averaging_rate(38, 0.95) == pytest.approx(0.05)
    assert averaging_rate(1000, 0.95) == pytest.approx(0.05)
    assert averaging_rate(0, 0.0) == averaging_rate(5, 0.0) == 1


def test_ordinary_steps_run_the_plain_graph():
    compiled, opt = make(every=1000, refresh_every=1000)
    armed = []
    for _ in range(23):
        armed.append(collector_of(compiled).armed)
        F.cross_entropy(compiled(IMAGES), LABELS).backward()
        assert bool(collector_of(compiled).sums.blocks) == armed[-1]
        opt.step()
        opt.zero_grad()
    early = [*range(9), 10, 12, 15, 18, 22]
    assert [step for step, due in enumerate(armed) if due] == early
    assert opt.diagnostics.statistics_steps == len(early)
