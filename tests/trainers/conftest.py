"""What trainers leave in a process is taken away after each test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """accelerate keeps what the first ``Accelerator`` of a process was asked for, and transformers
    tells it more by the environment."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
