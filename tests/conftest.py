"""What tests of several folders need."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from torch._dynamo import guards

from kfc_fx.compilation import armed_pass

# Pytest listens to every logger that passes nothing on, and torch writes down all that it compiles
# for whoever listens to this one.
logging.getLogger("torch.__trace").propagate = True
# Dynamo empties the processor's cache to measure how long guards take, of each frame it compiles.
guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[assignment]


# A trace makes many objects that stay. Each look for garbage goes through all that there are.
gc.set_threshold(100_000, 50, 100)

LONG = (
    "tests/kernels/test_triton_interpreter.py",
    "tests/distributed/test_data_parallel.py",
    "tests/distributed/test_faults.py",
    "tests/distributed/test_sharded.py",
    "tests/distributed/test_checkpoints.py",
    "tests/distributed/test_many_ranks.py",
    "tests/trainers/",
    "tests/tools/test_faults.py",
    "tests/tools/test_launches.py",
    "tests/tools/test_scripts.py",
    "tests/statistics/test_losses.py",
)
"""Tests that take long, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests that take long: at the end no worker waits for one of them."""
    place = {name: number for number, name in enumerate(LONG)}

    def order(item: pytest.Item) -> int:
        return next((place[name] for name in LONG if item.nodeid.startswith(name)), len(LONG))

    items.sort(key=order)


@pytest.fixture(autouse=True)
def compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile graphs with statistics at their first call, so that few steps show what runs later."""
    monkeypatch.setattr(armed_pass, "BY_OP", 0)


@pytest.fixture
def fresh_dynamo() -> None:
    """No graph of another test: dynamo would compile again in place of capturing."""
    torch._dynamo.reset()
