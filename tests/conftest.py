"""What tests of several folders need."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile graphs with statistics at their first call, so that few steps show what runs later."""
    monkeypatch.setattr(armed_pass, "BY_OP", 0)


@pytest.fixture
def fresh_dynamo() -> None:
    """No graph of another test: dynamo would compile again in place of capturing."""
    torch._dynamo.reset()
