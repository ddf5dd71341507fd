"""Lines of a script that are changed for KFC, in the copy of it that runs."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from kfc_fx.errors import counted

IMPORT = "import kfc_fx"


class PatternError(Exception):
    """A script has another text than the rule for it was written for."""


@dataclass(frozen=True)
class Edit:
    """One statement, and the lines in its place."""

    start: str
    """What the statement begins with."""
    lines: tuple[str, ...]
    """Where one of them is ``"..."``, the statement itself stays there."""
    file: str = ""
    """Path in the project; that of the script itself where it is empty."""

    @property
    def changed(self) -> int:
        """How many lines a person would write; ``import kfc_fx`` is not among them."""
        return sum(line not in ("...", IMPORT) for line in self.lines)


def edited(source: str, edits: list[Edit]) -> str:
    """A script with its edits made, and kfc_fx imported.

    Raises:
        PatternError: not exactly one statement begins as an edit says.
    """
    lines = source.splitlines()
    found = [(*_span(source, edit.start), edit) for edit in edits]
    for first, last, edit in sorted(found, key=lambda entry: entry[0], reverse=True):
        old = lines[first:last]
        indent = old[0][: len(old[0]) - len(old[0].lstrip())]
        new: list[str] = []
        for line in edit.lines:
            new += old if line == "..." else [indent + line]
        lines[first:last] = new
    lines.insert(_first_import(source), IMPORT)
    return "\n".join(lines) + "\n"


def _span(source: str, start: str) -> tuple[int, int]:
    """The lines ``[first, last)`` of the one statement that begins with ``start``."""
    spans = [
        (node.lineno - 1, node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt)
        and source.splitlines()[node.lineno - 1][node.col_offset :].startswith(start)
    ]
    if len(spans) != 1:
        raise PatternError(f"{counted(len(spans), 'statement')} that begin with {start!r}, not 1")
    return spans[0]


def _first_import(source: str) -> int:
    """The line of the first import that may stand anywhere."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import) or (
            isinstance(node, ast.ImportFrom) and node.module != "__future__"
        ):
            return node.lineno - 1
    raise PatternError("no import at the top of the file")
