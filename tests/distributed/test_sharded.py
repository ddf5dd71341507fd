"""Training under ``fully_shard``: on two ranks, and on four with replicas of the shards."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.sharded import SCENARIOS

FEW = ["steps_are_those_of_one_process"]
"""What four ranks run too."""

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(ranks):
    names = [scenario.__name__ for scenario in SCENARIOS] if ranks == 2 else FEW
    printed = run_ranks("tests.distributed.sharded", ranks, *names)
    assert printed.split("passed: ")[1:] == [f"{name}\n" for name in names]
