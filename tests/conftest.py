"""What tests of several folders need."""

from __future__ import annotations

import logging

import pytest
import torch

# Pytest listens to every logger that passes nothing on, and torch writes down all that it compiles
# for whoever listens to this one.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture
def fresh_dynamo() -> None:
    """No graph of another test: dynamo would compile again in place of capturing."""
    torch._dynamo.reset()
