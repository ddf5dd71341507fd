"""Tables of the site are made from the committed files, and the README says the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
if not (ROOT / "benchmarks").exists():
    pytest.skip("a source distribution has no benchmarks/", allow_module_level=True)
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import figure_tables  # noqa: E402 - from the folder above
import race_tables  # noqa: E402

NAMED = re.findall(r"^:::\{measured\} (.+)$", "\n".join(
    page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")
), re.MULTILINE)  # fmt: skip
TABLES = {**figure_tables.TABLES, **race_tables.TABLES}


@pytest.mark.parametrize("line", NAMED)
def test_a_table_of_a_page_is_whole(line):
    name, *arguments = line.split()
    head, *body = TABLES[name](*arguments)
    assert body
    for row in body:
        assert len(row) == len(head)
        assert any(re.search(r"\d", cell) for cell in row[1:])


def test_every_table_has_its_page():
    assert {line.split()[0] for line in NAMED} == set(TABLES)


def test_a_missing_file_or_field_is_no_empty_table(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError):
        race_tables.ends("train-tomorrow")
    monkeypatch.setattr(figure_tables, "BENCHMARKS", tmp_path)
    (tmp_path / "steps-of-nobody.json").write_text("{}")
    with pytest.raises(KeyError):
        figure_tables.kernels("steps-of-nobody")


# -- the one table of figures outside the site -------------------------------------------------


def fewer(rival: str) -> str:
    """Times fewer steps of "adam" to a rival's end, of the first cell of each task."""
    found = []
    for cell in race_tables.raced("train")[:5]:
        targets = {target.rival: target for target in race_tables._adam(cell).targets}
        found.append(cell.steps / targets[rival].shortened)
    return f"{min(found):.1f} to {max(found):.1f} times fewer"


def of_steps(what: str) -> str:
    _, *rows = figure_tables.steps()
    (row,) = (row for row in rows if row[0].startswith(what))
    return row[1]


def on_the_gpu() -> str:
    _, *rows = figure_tables.gpu_layers()
    own = [float(row[5]) for row in rows if row[1] == "bfloat16" and is_three_by_three(row[0])]
    return f"{min(own):.2g} to {max(own):.2g} times faster"


def is_three_by_three(layer: str) -> bool:
    return layer.startswith(("ResNet-18", "ResNet-50", "VGG")) and not re.search(
        "stem, 224|1x1", layer
    )


def against_sgd() -> str:
    _, *rows = race_tables.against_sgd("train")
    (row,) = (row for row in rows if row[0] == "the paper's net, 512 (300)")
    return f"{row[3]} times fewer"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("plain step of compiled", lambda: of_steps("plain step")),
        ("mean step of", lambda: of_steps("mean step, KFC adam")),
        ("five tasks, 42 steps", lambda: fewer("soap")),
        ("the same to Muon", lambda: fewer("muon")),
        ('steps of "adam" to the end of SGD\'s 300', against_sgd),
        ("Ω of a 3x3 convolution on an H100", on_the_gpu),
    ],
)
def test_the_readme_says_what_was_measured(what, expected):
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {what}"))
    assert line.split(" | ")[-1].removesuffix(" |") == expected()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "#", "!"))]
    text = re.sub(r"^- ", ". ", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text).replace("\n\n", ". ")
    sentences = re.split(r"[.:;](?:\s|$)", text)
    assert [s for s in sentences if len(s.split()) > 25] == []
