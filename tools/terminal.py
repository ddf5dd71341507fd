"""The console of the commands: coloured on a terminal, plain in a pipe, and no table is cut."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from kfc_fx.tools.failures import CommandError

PIPED_WIDTH = 1000
"""A pipe has no width; a row of a table stays on one line there, for grep."""


class WholeConsole(Console):
    """Folds the cells of a table between words, and keeps the width that this needs.

    A table of rich's own ends what does not fit by an ellipsis, or without one in columns that do
    not wrap. Here the lines of a table that is still too wide are left to the terminal to break.
    Square brackets are text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """As ``Console.print``, with whole tables."""
        own = self.width
        for table in _tables(args):
            for column in table.columns:
                self._keep_words(column)
            self.width = max(self.width, self.measure(table, options=self._unbounded()).minimum)
        try:
            super().print(*args, **{"crop": False, **kwargs})
        finally:
            self.width = own

    def _keep_words(self, column: Column) -> None:
        """Let the column have the width of its longest word, or of its longest cell where it does
        not wrap."""
        cells = (column.header, *column.cells)
        found = [self.measure(cell, options=self._unbounded()) for cell in cells]
        needed = max(size.maximum if column.no_wrap else size.minimum for size in found)
        column.min_width = max(needed, column.min_width or 0)
        column.overflow = "fold"

    def _unbounded(self) -> ConsoleOptions:
        return self.options.update(width=PIPED_WIDTH)


def output_console() -> Console:
    """Standard output. ``NO_COLOR`` and ``FORCE_COLOR`` are respected."""
    console = WholeConsole()
    return console if console.is_terminal else WholeConsole(width=PIPED_WIDTH)


def plain_text(shown: RenderableType) -> str:
    """What a pipe gets."""
    buffer = io.StringIO()
    console = WholeConsole(file=buffer, width=PIPED_WIDTH, force_terminal=False, color_system=None)
    console.print(shown, soft_wrap=not _is_wide(shown))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def show(shown: RenderableType, save: Path | None = None) -> None:
    """Print to standard output, or save as plain text."""
    if save is not None:
        write(save, plain_text(shown))
        return
    console = output_console()
    if console.is_terminal:
        console.print(shown, soft_wrap=not _is_wide(shown))
    else:
        print(plain_text(shown), end="")


def show_json(document: Mapping[str, Any], save: Path | None) -> None:
    """Print or save as JSON."""
    show_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", save)


def show_text(text: str, save: Path | None) -> None:
    """Print or save text as it is."""
    if save is not None:
        write(save, text)
    else:
        print(text, end="")


def write(path: Path, text: str) -> None:
    """Save text, and say so on standard error.

    Raises:
        CommandError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--save {path}: {error.strerror or error}") from error
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"saved {path}")


def _is_wide(shown: RenderableType) -> bool:
    """Whether it is laid out in columns; code is left to wrap where the terminal does."""
    return not isinstance(shown, str | Text)


def _tables(shown: Iterable[object]) -> Iterator[Table]:
    """Every table in what is printed, those in groups included."""
    for part in shown:
        if isinstance(part, Table):
            yield part
        elif isinstance(part, Group):
            yield from _tables(part.renderables)
