"""The console of the commands that show things: coloured on a terminal, plain in a pipe."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from kfc_fx.tools.failures import CommandError

PIPED_WIDTH = 1000
"""A pipe has no width; a row of a table stays on one line there, for grep."""
LEAST_WIDTH = 140
"""On a narrower terminal tables keep this width, and the terminal breaks their lines."""


def output_console() -> Console:
    """Standard output. ``NO_COLOR`` and ``FORCE_COLOR`` are respected."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def plain_text(shown: RenderableType) -> str:
    """What a pipe gets."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=PIPED_WIDTH, highlight=False, force_terminal=False, color_system=None
    )
    console.print(shown, soft_wrap=not _is_wide(shown))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def show(shown: RenderableType, save: Path | None) -> None:
    """Print to standard output, or save as plain text."""
    if save is not None:
        write(save, plain_text(shown))
        return
    console = output_console()
    if not console.is_terminal:
        print(plain_text(shown), end="")
        return
    if _is_wide(shown):
        console = Console(highlight=False, width=max(console.width, LEAST_WIDTH))
    console.print(shown, soft_wrap=not _is_wide(shown))


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
