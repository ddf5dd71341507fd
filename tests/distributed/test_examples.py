"""The scripts of ``examples/`` for several processes, as they are."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from tests.distributed.launch import ROOT

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize(("name", "least", "saved"), [("ddp", 85, "digits-ddp.pt"), ("fsdp2", 70, "digits-fsdp2/.metadata")])  # fmt: skip
def test_scripts_train(name, least, saved, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    known = re.search(r"2 processes: ([\d.]+) % of the test images", result.stdout)
    assert float(known.group(1)) >= least
    assert (tmp_path / saved).exists()
