"""The catalogue of the zoo: every entry of every model library that is installed."""

from __future__ import annotations

import importlib
from fnmatch import fnmatch
from functools import cache

from kfc_fx.tools.failures import did_you_mean
from kfc_fx.tools.zoo.case import ZooEntry

LIBRARIES = {
    "torchvision": "torchvision",
    "transformers": "transformers",
    "timm": "timm",
    "diffusers": "diffusers",
    "kfc_fx": "kfc_fx",
}
"""Library to the module that has to be installed for it, in the order of the run."""


@cache
def entries_of(library: str) -> tuple[ZooEntry, ...]:
    """The entries of one library.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    importlib.import_module(LIBRARIES[library])
    module = importlib.import_module(f"kfc_fx.tools.zoo.{library}")
    return tuple(module.entries())


def find_entry(path: str) -> ZooEntry:
    """The entry at ``library/family/name``.

    Raises:
        KeyError: there is none; the message names the nearest.
    """
    library = path.partition("/")[0]
    by_path = {entry.path: entry for entry in entries_of(library)}
    if path not in by_path:
        raise KeyError(f"no model {path!r} in the zoo{did_you_mean(path, by_path)}")
    return by_path[path]


def matches(entry: ZooEntry, patterns: list[str]) -> bool:
    """Whether an entry's path has a pattern in it, or as a shell pattern fits it whole."""
    return not patterns or any(p in entry.path or fnmatch(entry.path, p) for p in patterns)
