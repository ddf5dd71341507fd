"""Every code block of the project's pages is true: it runs, or it is what comes out today.

The words behind the opening fence say what a block is: ``python`` runs, with the page's other
blocks in one namespace; ``python trainers`` does so in tests/trainers, which has the packages;
``python update`` shows parts of the source of the ``opt`` that those made;
``console`` shows commands with their output; ``sh`` has commands alone; ``text`` is no code. A line
``...`` stands for any lines.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from kfc_fx.codegen.text import products
from kfc_fx.tools.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]
FENCED = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KINDS = ("python", "python trainers", "python update", "console", "sh", "text")


@dataclass(frozen=True)
class Block:
    page: Path
    kind: str
    text: str


BLOCKS = [Block(page, *found) for page in PAGES for found in FENCED.findall(page.read_text())]


def blocks(kind: str) -> list[Any]:
    found = [block for block in BLOCKS if block.kind == kind]
    return [pytest.param(b, id=f"{b.page.name}: {b.text.splitlines()[0]}") for b in found]


@dataclass
class Run:
    """What is left of the Python blocks of one page."""

    namespace: dict[str, Any] = field(default_factory=dict)
    output: StringIO = field(default_factory=StringIO)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Run]:
    found = {page: Run() for page in PAGES}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("pages"))  # pages save files
        patched.setattr(products, "onednn_is_faster", lambda: False)  # products as they are shown
        for block in BLOCKS:
            if block.kind == "python":
                run = found[block.page]
                with redirect_stdout(run.output):
                    exec(compile(block.text, str(block.page), "exec"), run.namespace)
    return found


def missing(shown: str, whole: str) -> list[str]:
    """The first run of shown lines, between lines ``...``, that the whole text lacks in its order.

    Indentation in common and blank lines in the whole text do not count.
    """
    lines = [line.strip() for line in whole.splitlines() if line.strip()]
    for elided, group in groupby(shown.splitlines(), key=lambda line: line.strip() == "..."):
        part = [line.strip() for line in group if line.strip()]
        if elided or not part:
            continue
        starts = range(len(lines) - len(part) + 1)
        start = next((at for at in starts if lines[at : at + len(part)] == part), None)
        if start is None:
            return part
        lines = lines[start + len(part) :]
    return []


def test_every_block_says_what_it_is():
    assert {block.page.name for block in BLOCKS} >= {"README.md"}
    assert [block for block in BLOCKS if block.kind not in KINDS] == []


def test_python_blocks_run(runs):
    for page in {block.page for block in BLOCKS if block.kind == "python"}:
        assert "import kfc_fx" in page.read_text()
    printed = runs[ROOT / "README.md"].output.getvalue()
    assert "def apply(" in printed
    assert "generic" in printed


@pytest.mark.parametrize("block", blocks("python update"))
def test_the_update_that_is_shown_is_the_one_of_the_example(runs, block):
    source = runs[block.page].namespace["opt"].update_source
    for part in block.text.split("\n\n"):
        assert missing(part, source) == []


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_print_what_is_shown(block):
    _, *commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert commands
    for command in commands:
        line, _, shown = command.partition("\n")
        program, *arguments = shlex.split(line)
        assert program == "kfc-fx"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert missing(shown, result.stdout) == [], result.stdout


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_exist(block):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in block.text.splitlines():
        program, name, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert name in targets
        elif program == "pip":
            (what,) = arguments
            package, _, extras = what.removesuffix("]").partition("[")
            assert (name, package) == ("install", PROJECT["name"])
            assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"])
        elif program == "torchrun":
            assert (ROOT / arguments[-1]).exists()
        else:
            assert program == "kfc-fx"
            found = get_command(app).commands[name]
            if hasattr(found, "commands"):  # kfc-fx bench train
                name, *arguments = arguments
                found = found.commands[name]
            options = {o for p in found.params for o in p.opts}
            assert {a for a in arguments if a.startswith("--")} <= options


PATHS = re.compile(r"`((?:kfc_fx|kernels|tools|tests|examples|benchmarks|docs)/[\w/.-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = {name for name in PATHS.findall(page.read_text()) if "NAME" not in name}
    named = {name for name in named if not name.startswith("docs/_build/")}  # what make docs makes
    if not (ROOT / "benchmarks").exists():  # in a source distribution
        named = {name for name in named if not name.startswith("benchmarks/")}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize(
    ("shown", "lacking"),
    [
        ("b\nc", []),
        ("  a\n...\nd", []),
        ("a\nc", ["a", "c"]),
        ("d\n...\na", ["a"]),
        ("B", ["B"]),
    ],
)
def test_what_is_shown_is_looked_for_line_by_line(shown, lacking):
    assert missing(shown, "a\n\nb\n  c\nd\n") == lacking
