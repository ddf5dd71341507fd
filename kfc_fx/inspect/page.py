"""The inspector's document as one HTML file that opens from disk, without server or network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from kfc_fx.inspect.packing import embedded_json, pack_document

STYLES = ("theme.css", "frame.css", "graph.css", "panels.css", "plots.css", "world.css")
SCRIPTS = (
    "elements.js",
    "numbers.js",
    "document.js",
    "hierarchy.js",
    "edges.js",
    "layout.js",
    "colours.js",
    "viewport.js",
    "graph_view.js",
    "module_tree.js",
    "stage_list.js",
    "plots.js",
    "factors.js",
    "overview.js",
    "details.js",
    "code_links.js",
    "code_view.js",
    "run_view.js",
    "world_panel.js",
    "panel.js",
    "search.js",
    "selection.js",
    "keyboard.js",
    "main.js",
)
"""The page's own scripts, in the order in which they are read; they share one scope."""


def render(document: Mapping[str, Any]) -> str:
    """One self-contained page for a document of schema 1.

    The page loads nothing: style, scripts and the layout library (dagre) stand in it, and its
    content security policy allows only these very texts, by their hashes. Names of the model
    reach the page as JSON and are shown as text.

    Raises:
        ValueError: a document of another schema.
    """
    schema = document.get("schema")
    if schema != 1:
        raise ValueError(f"the page shows documents of schema 1, this one has schema {schema!r}")
    style = "".join(_read(f"browser/{name}") for name in STYLES)
    script = _script()
    return Template(_read("browser/template.html")).substitute(
        policy=f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}",
        style=style,
        script=script,
        document=embedded_json(pack_document(document)),
    )


def _script() -> str:
    """dagre with its licence, then the page's scripts in one scope of their own."""
    licence = _read("vendor/dagre/LICENSE").strip()
    library = _read("vendor/dagre/dagre.min.js")
    own = "\n".join(f"// {name}\n{_read('browser/' + name)}" for name in SCRIPTS)
    return f'\n/* dagre\n\n{licence}\n*/\n{library}\n(() => {{\n"use strict";\n{own}}})();\n'


def _read(path: str) -> str:
    return files("kfc_fx.inspect").joinpath(path).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """A content security policy's name for an inline text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
