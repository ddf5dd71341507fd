from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from kfc_fx.tools.train.comparison import compare, smoothed, smoothing_half_window
from kfc_fx.tools.train.training_run import RunRecord

MakeRecord = Callable[..., RunRecord]
FALLING = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def test_smoothing_is_a_centred_mean() -> None:
    assert smoothed([1, 2, 9, 4, 5], 1) == [1, 4, 5, 6, 4.5]
    assert smoothed([], 3) == []


def test_smoothing_keeps_a_straight_line_where_it_is() -> None:
    curve = smoothed(FALLING, 2)
    assert curve[:6] == FALLING[:6]
    assert curve[6:] == [2.5, 2.0]  # the mean of the last four, and of the last three


def test_window_grows_with_the_run_within_bounds() -> None:
    assert [smoothing_half_window(steps) for steps in (0, 100, 440, 10**6)] == [2, 2, 11, 100]


def test_target_is_the_end_of_sgd(make_record: MakeRecord) -> None:
    sgd = make_record("sgd", FALLING)
    kfc = make_record("kfc", [8.0, 3.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1])
    comparison = compare([kfc, sgd])
    assert comparison.reference is sgd
    assert comparison.target == pytest.approx((3 + 2 + 1) / 3)
    row, sgd_row = comparison.rows
    # Smoothed: 8, 4, 2.58, 1.04, ...
    assert (row.iterations, row.seconds) == (4, 4.5)
    assert (sgd_row.iterations, sgd_row.seconds) == (8, 8.5)
    assert sgd_row.final_loss == comparison.target


def test_without_sgd_the_slowest_sets_the_target(make_record: MakeRecord) -> None:
    fast, slow = make_record("kfc", [1.0] * 6), make_record("adamw", [2.0] * 6)
    comparison = compare([fast, slow])
    assert comparison.reference is slow
    assert comparison.target == 2.0


def test_a_run_that_does_not_get_there(make_record: MakeRecord) -> None:
    comparison = compare([make_record("kfc", [3.0] * 6), make_record("sgd", [2.0] * 6)])
    assert comparison.rows[0].iterations is None
    assert comparison.rows[0].seconds is None
    assert comparison.rows[0].final_loss == 3.0


def test_a_diverged_run_sets_no_target(make_record: MakeRecord) -> None:
    sgd, kfc = make_record("sgd", [2.0, math.nan], 6), make_record("kfc", [2.0] * 6)
    comparison = compare([kfc, sgd])
    assert comparison.reference is kfc
    assert comparison.rows[1].iterations == 1
    alone = compare([sgd])
    assert (alone.target, alone.reference, alone.rows[0].iterations) == (None, None, None)


def test_nothing_to_compare() -> None:
    assert compare([]).rows == ()
