"""The table of options has every option, with its default."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import kfc_fx

PAGE = (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.*?) ?\| .+ \|$", re.MULTILINE)
NOT_OURS = ("foreach", "fused", "capturable", "differentiable", "unknown", "self", "params")
VALUES = ("Adam", "Spectral", "Eigen", "Inverse", "Statistics", "GenericAdamW", "GenericSGD")


def told(name: str) -> dict[str, str]:
    found = ROW.findall(PAGE)
    return {option: default for option, owners, default in found if f"`{name}`" in owners}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    shown = {f.name: f.default for f in fields(getattr(kfc_fx, name))}
    assert {option: ast.literal_eval(text) for option, text in told(name).items()} == shown


@pytest.mark.parametrize("name", ["KFC", "compile"])
def test_functions(name):
    parameters = inspect.signature(getattr(kfc_fx, name)).parameters
    own = {n: p.default for n, p in parameters.items() if n not in NOT_OURS}
    if name == "compile":
        del own["model"]
    shown = {option: text for option, text in told(name).items() if option != "params"}
    assert shown.pop("statistics", "Statistics()") == "Statistics()"
    own.pop("statistics", None)
    assert {option: ast.literal_eval(text) for option, text in shown.items()} == own
