"""Checkpoints of several ranks, resumed on as many, on more and in one process."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


def test_runs_resume_on_any_number_of_ranks(tmp_path):
    saved = _told("save", 2, tmp_path)
    assert len(saved) == 8
    assert _told("resume", 2, tmp_path) == saved  # and go on bit for bit
    for ranks in (1, 3):
        resumed = _told("resume", ranks, tmp_path)
        there = {key: value for key, value in resumed.items() if key.endswith("saved")}
        assert there == {key: value for key, value in saved.items() if key.endswith("saved")}


def _told(action, ranks, folder):
    printed = run_ranks("tests.distributed.checkpoints", ranks, action, str(folder))
    return json.loads(printed.splitlines()[-1])
