"""Capture and statistics of models under ``fully_shard``, on two gloo processes."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import run_ranks


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_sharded_models_have_the_factors_of_each_ranks_batch():
    printed = run_ranks("tests.capture.sharded_capture", 2)
    assert "sharded models have true factors" in printed
