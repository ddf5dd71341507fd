"""What torch's own tools show of the compiler: its structured trace, and profiler ranges."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from tests.models import backward, make

PROGRAM = """
import torch
import kfc_fx
from torch import nn
from torch.nn import functional as F

compiled = kfc_fx.compile(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
opt = kfc_fx.KFC(compiled, lr=0.1)
F.cross_entropy(compiled(torch.randn(6, 4)), torch.zeros(6, dtype=torch.long)).backward()
opt.step()
"""


def test_stages_and_update_are_artefacts_of_the_structured_trace(tmp_path):
    subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"TORCH_TRACE": str(tmp_path), "PATH": ""}, check=True
    )
    (log,) = tmp_path.glob("*.log")
    text = log.read_text()
    for name in ("canonical", "probes", "emissions", "emitting", "update"):
        assert f'"name": "kfc_fx_{name}"' in text, name
    assert "emission_emit(" in text
    assert "def accumulate(" in text


def test_profiler_ranges_name_the_blocks():
    compiled, opt = make()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        backward(compiled)
        opt.step()
    names = {event.key for event in recorded.key_averages()}
    blocks = {f"kfc_fx::statistics {block.name}" for block in compiled.kfc.plan.blocks}
    assert blocks | {"kfc_fx::accumulate", "kfc_fx::refresh", "kfc_fx::apply"} <= names
    assert torch.is_grad_enabled()
