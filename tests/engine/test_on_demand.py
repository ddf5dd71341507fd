"""Mappings whose values are made when they are asked for."""

from __future__ import annotations

import pytest

from kfc_fx.engine.on_demand import OnDemand


def test_values_are_made_when_they_are_asked_for_and_not_before():
    made = []
    squares = OnDemand([2, 3], lambda key: made.append(key) or key**2)
    assert list(squares) == [2, 3]
    assert len(squares) == 2
    assert 2 in squares
    assert 4 not in squares
    assert not made
    assert dict(squares) == {2: 4, 3: 9}
    assert made == [2, 3]
    with pytest.raises(KeyError):
        squares[4]
