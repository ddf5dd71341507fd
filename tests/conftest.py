"""What tests of several folders need."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def fresh_dynamo() -> None:
    """No graph of another test: dynamo would compile again in place of capturing."""
    torch._dynamo.reset()
