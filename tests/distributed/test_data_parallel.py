"""Training under ``DistributedDataParallel``, on two and three gloo processes."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.data_parallel import SCENARIOS
from tests.distributed.launch import run_ranks

FEW = [
    "factors_and_first_steps_are_those_of_one_process",
    "uneven_batches_count_by_their_examples",
    "an_expert_that_one_rank_does_not_use_is_a_block_on_all",
]
"""What is run by three ranks too."""

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize("part", range(3))
def test_two_ranks(part):
    names = [scenario.__name__ for scenario in SCENARIOS][part::3]
    printed = run_ranks("tests.distributed.data_parallel", 2, *names)
    assert printed.split("passed: ")[1:] == [f"{name}\n" for name in names]


def test_three_ranks():
    printed = run_ranks("tests.distributed.data_parallel", 3, *FEW)
    assert printed.split("passed: ")[1:] == [f"{name}\n" for name in FEW]
