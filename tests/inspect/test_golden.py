"""What the views of three small networks look like, as text files.

``KFC_FX_WRITE_GOLDEN=1 pytest tests/inspect/test_golden.py`` writes them anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfc_fx.tools.cli import app
from tests.inspect.small_networks import INPUTS

GOLDEN = Path(__file__).parent / "golden"
VIEWS = {
    "summary": ["--view", "summary"],
    "plan": ["--view", "plan"],
    "graph": ["--view", "graph", "--stage", "emitting", "--capture", "symbolic"],
    "update": ["--view", "update"],
    "dot": ["--view", "dot", "--stage", "canonical", "--capture", "symbolic"],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("network", INPUTS, ids=lambda network: network.__name__)
def test_a_view_is_as_it_was(network, view):
    target = f"tests.inspect.small_networks:{network.__name__}"
    result = CliRunner().invoke(app, ["inspect", target, "--input", INPUTS[network], *VIEWS[view]])
    assert result.exit_code == 0, result.output
    path = GOLDEN / f"{network.__name__}.{view}.txt"
    if os.environ.get("KFC_FX_WRITE_GOLDEN"):
        path.write_text(result.stdout, encoding="utf-8")
    assert result.stdout == path.read_text(encoding="utf-8")
