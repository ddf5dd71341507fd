"""Docstrings of properties: text and sections as those of methods.

Napoleon takes what stands before a colon in the first line of a property's docstring for its type.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

BEFORE_NAPOLEON = 400


def as_method(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Turn the sections of a property into fields; the first line is empty then, and no type."""
    if what == "property":
        done = GoogleDocstring(lines, app.config, app, "method", name, obj, options)
        lines[:] = ["", *done.lines()]


def setup(app: Sphinx) -> dict[str, bool]:
    """Come before napoleon."""
    app.connect("autodoc-process-docstring", as_method, priority=BEFORE_NAPOLEON)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
