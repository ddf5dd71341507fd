"""The page of trainers: its blocks run, in their order."""

from __future__ import annotations

import os

import pytest

from tests.test_readme import BLOCKS
from tests.trainers.needed import needed

pytestmark = pytest.mark.filterwarnings("default")  # of packages that are not ours, on one page


def test_its_blocks_run(tmp_path, capsys, monkeypatch):
    for package in ("transformers", "accelerate", "lightning", "timm", "peft"):
        needed(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = [block for block in BLOCKS if block.kind == "python trainers"]
    assert len(found) == 5
    namespace: dict[str, object] = {}
    for block in found:
        exec(compile(block.text, str(block.page), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "lora_A" in printed
    assert os.listdir(tmp_path) in ([], ["run"])
