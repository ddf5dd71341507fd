"""The scripts of ``examples/`` for several processes, as they are."""

from __future__ import annotations

import re

import pytest
import torch

from tests.distributed.launch import ROOT, torchrun

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize(("name", "least", "saved"), [("ddp", 85, "digits-ddp.pt"), ("fsdp2", 70, "digits-fsdp2/.metadata")])  # fmt: skip
def test_scripts_train(name, least, saved, tmp_path):
    printed = torchrun(2, str(ROOT / "examples" / f"{name}.py"), folder=tmp_path)
    known = re.search(r"2 processes: ([\d.]+) % of the test images", printed)
    assert float(known.group(1)) >= least
    assert (tmp_path / saved).exists()
