"""Processes that die, come late or fail alone: the others go on from a checkpoint, or say why not."""

from __future__ import annotations

import re

import pytest
import torch

from tests.distributed import faulty
from tests.distributed.launch import run_machines, torchrun

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)
FAULTY = "tests.distributed.faulty"


def _ended(kill_at, folder):
    printed = torchrun(
        2, "--max-restarts=1", "-m", FAULTY, "restart", str(folder), kill_at,
        environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # else gloo never restarts
    )  # fmt: skip
    return re.search(r"ended after 12 steps: (\S+), from (\d+), by 2", printed).groups()


def test_a_killed_process_is_restarted_from_the_last_whole_checkpoint(tmp_path):
    ends = {}
    for kill_at in ("step", "save"):
        folder = tmp_path / kill_at
        folder.mkdir()
        ends[kill_at] = _ended(kill_at, folder)
    assert ends["step"] == (ends["save"][0], "6")  # from another place to the same end, bit for bit
    assert ends["save"][1] == "3"


def test_a_run_goes_on_without_a_machine_that_is_lost(tmp_path):
    restarts = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    printed = run_machines(
        2, 3, "--max-restarts=3", "-m", FAULTY, "restart", str(tmp_path), "machine",
        environments=[restarts, restarts, {**restarts, faulty.LOST: "1"}],
    )  # fmt: skip
    ends = re.findall(r"ended after 12 steps: \S+, from (\d+), by (\d)", "".join(printed))
    assert ends == [("6", "2")]


def test_a_rank_that_does_not_come_ends_the_others_at_the_time_out_of_their_group(tmp_path):
    printed = torchrun(2, "-m", FAULTY, "late", str(tmp_path), any_end=True)
    found = re.search(r"after (\d+) s: rank 0 has waited \d+ s for the other ranks", printed)
    assert 7 <= int(found.group(1)) < 20


def test_a_rank_that_has_failed_alone_ends_the_others_with_its_message(tmp_path):
    printed = torchrun(2, "-m", FAULTY, "alone", str(tmp_path), any_end=True)
    found = re.search(r"after (\d+) s: rank 1 has failed after 11 steps .*TypeError", printed)
    assert int(found.group(1)) < 20
