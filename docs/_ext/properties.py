"""Docstrings of properties and attributes: text and sections as those of methods.

Napoleon takes what stands before a colon in their first line for their type.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

BEFORE_NAPOLEON, AFTER_NAPOLEON = 400, 600
KINDS = ("attribute", "property")

_given: dict[str, list[str]] = {}


def keep(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Keep the docstring as it is written."""
    if what in KINDS:
        _given[name] = list(lines)


def as_method(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Put what napoleon makes of a method's docstring in place of what it has made of this one."""
    if what in KINDS:
        given = _given.pop(name)
        done = GoogleDocstring(given, app.config, app, "method", name, obj, options)
        lines[:] = [*done.lines(), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Come before napoleon and after it."""
    app.connect("autodoc-process-docstring", keep, priority=BEFORE_NAPOLEON)
    app.connect("autodoc-process-docstring", as_method, priority=AFTER_NAPOLEON)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
