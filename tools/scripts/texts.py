"""Text in the place of files that a script would download."""

from __future__ import annotations

import pickle
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

TEXT_FILE = "tinyshakespeare.txt"
PARTS = {"train": (0.0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1.0)}


def put_words(folder: Path, data_dir: Path | None) -> str:
    """Three files of text in the folder ``text``."""
    text, title = _text(data_dir)
    place = folder / "text"
    place.mkdir()
    lines = text.splitlines()
    for part, (start, end) in PARTS.items():
        own = lines[int(start * len(lines)) : int(end * len(lines))]
        (place / f"{part}.txt").write_text("\n".join(own) + "\n", encoding="utf-8")
    return f"{title}, by words"


def put_characters(folder: Path, data_dir: Path | None) -> str:
    """What nanoGPT's ``data/shakespeare_char/prepare.py`` leaves."""
    text, title = _text(data_dir)
    place = folder / "data" / "shakespeare_char"
    letters = sorted(set(text))
    numbers = {letter: number for number, letter in enumerate(letters)}
    ids = np.array([numbers[letter] for letter in text], dtype=np.uint16)
    bound = int(0.9 * len(ids))
    ids[:bound].tofile(place / "train.bin")
    ids[bound:].tofile(place / "val.bin")
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": numbers}
    (place / "meta.pkl").write_bytes(pickle.dumps(meta))
    return f"{title}, by characters"


def put_input_text(folder: Path, data_dir: Path | None) -> str:
    """The file ``input.txt``."""
    text, title = _text(data_dir)
    (folder / "input.txt").write_text(text, encoding="utf-8")
    return f"{title}, by characters"


def _text(data_dir: Path | None) -> tuple[str, str]:
    """That of the user's folder, else the topics of Python's ``help``; and what to call it."""
    if data_dir is not None and (data_dir / TEXT_FILE).is_file():
        return (data_dir / TEXT_FILE).read_text(encoding="utf-8"), "tiny Shakespeare"
    return "\n".join(topics[name] for name in sorted(topics)), "topics of Python's help"
