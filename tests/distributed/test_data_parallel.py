"""Training under ``DistributedDataParallel``, on two and three gloo processes."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import changing_models, data_parallel, one_rank_differs
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize("program", [data_parallel, one_rank_differs, changing_models])
def test_two_ranks(program):
    names = [scenario.__name__ for scenario in program.SCENARIOS]
    printed = run_ranks(program.__name__, 2, *names)
    assert printed.split("passed: ")[1:] == [f"{name}\n" for name in names]


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("data_parallel", ["uneven_batches_count_by_their_examples"]),
        ("one_rank_differs", ["an_expert_that_one_rank_does_not_use_is_a_block_on_all"]),
        ("changing_models", ["a_group_of_some_ranks_divides_among_them"]),
    ],
)
def test_three_ranks(program, names):
    printed = run_ranks(f"tests.distributed.{program}", 3, *names)
    assert printed.split("passed: ")[1:] == [f"{name}\n" for name in names]
