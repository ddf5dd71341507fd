"""Failures that a user of the command line can mend: one line on stderr, exit code 2."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import typer
from rich.console import Console
from rich.text import Text

from kfc_fx.errors import KfcError, did_you_mean

USAGE_EXIT_CODE = 2

__all__ = [
    "USAGE_EXIT_CODE",
    "CommandError",
    "did_you_mean",
    "import_extra",
    "one_line_failures",
    "unknown_name",
    "writable",
]


class CommandError(Exception):
    """A wrong name, folder or file; the message is one line that says what to do."""


@contextmanager
def one_line_failures(*, debug: bool) -> Iterator[None]:
    """Turn a :class:`CommandError`, or an error of kfc_fx itself (a model that it cannot
    take, say), into one line on stderr and exit code 2.

    Args:
        debug: let the exception through, with its traceback.
    """
    try:
        yield
    except (CommandError, KfcError) as error:
        if debug:
            raise
        line = Text.assemble(("error: ", "bold red"), " ".join(str(error).split()))
        Console(stderr=True, soft_wrap=True).print(line)
        raise typer.Exit(USAGE_EXIT_CODE) from None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> CommandError:
    """The error for ``name``, which is none of ``known``, with the nearest of them."""
    names = list(known)
    return CommandError(
        f"unknown {kind} {name!r}{did_you_mean(name, names)}; there are: {', '.join(names)}"
    )


def writable(option: str, path: Path) -> Path:
    """``path``, with its folder made, so that a long run does not end without its file.

    Raises:
        CommandError: it cannot be written, named by ``option``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise CommandError(f"{option} {path}: {error.strerror or error}") from error
    return path


def import_extra(module: str, purpose: str) -> ModuleType:
    """Import a module that only the ``demo`` extra installs.

    Args:
        module: name as in an import statement.
        purpose: what needs it, the subject of the error's sentence.

    Raises:
        CommandError: the distribution that holds it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise CommandError(
            f"{purpose} needs {missing}, which is not installed: pip install 'kfc_fx[demo]'"
        ) from error
