"""Properties of the rewrite on random networks, at fixed seeds. ``make fuzz`` draws more."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.vendor.pretty import pretty

from tests import properties
from tests.strategies import networks

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FIXED = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@FIXED
@given(networks())
def test_results_stay_the_same(drawn):
    properties.results_stay_the_same(drawn)


@FIXED
@given(networks())
def test_factors_equal_the_oracle(drawn):
    properties.factors_equal_the_oracle(drawn)


@FIXED
@given(networks())
def test_the_compiler_is_reproducible(drawn):
    properties.the_compiler_is_reproducible(drawn)


@FIXED
@given(networks())
def test_front_ends_agree(drawn):
    properties.front_ends_agree(drawn)


@FIXED
@given(networks(coupled=False, random=False))
def test_batches_add_up(drawn):
    properties.batches_add_up(drawn)


@settings(FIXED, max_examples=200)
@given(networks())
def test_a_drawn_network_is_a_program_that_runs(drawn):
    assert drawn.build()(drawn.example(2)).shape == (2, 3)
    assert "class Net(nn.Module)" in pretty(drawn)
