"""What stands in for downloads, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kfc_fx.tools.scripts.citations import put_citations
from kfc_fx.tools.scripts.images import (
    put_cifar10,
    put_image_folder,
    put_mnist,
    put_photographs,
)
from kfc_fx.tools.scripts.texts import put_characters, put_input_text, put_words

STAND_INS: dict[str, Callable[[Path, Path | None], str]] = {
    "mnist": put_mnist,
    "cifar10": put_cifar10,
    "image_folder": put_image_folder,
    "photographs": put_photographs,
    "words": put_words,
    "characters": put_characters,
    "input_text": put_input_text,
    "citations": put_citations,
}
"""Each gets the folder that a script runs in, and the folder of data that the user named, if any;
it writes files or replaces the function that would download, and returns what to call the data."""
