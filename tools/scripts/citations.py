"""A made graph of citations in the files of Cora, where a script would download these."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kfc_fx.tools.failures import import_extra

PAPERS, WORDS, CLASSES, CITATIONS = 2000, 1433, 7, 4000
WORDS_OF_PAPER, WORDS_OF_CLASS = 18, 200
OWN_CLASS = 0.8
"""Share of the citations that are of the same class, of which a third of a paper's words are."""


class Download:
    """What ``requests.get(address, stream=True)`` returns, as far as a script reads it."""

    def __init__(self, content: bytes) -> None:
        self.raw = io.BytesIO(content)

    def __enter__(self) -> Download:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.raw.close()


def put_citations(folder: Path, data_dir: Path | None) -> str:
    """``requests.get`` gives the archive of a made graph, whatever it is asked for."""
    archive = _archive(*_papers(np.random.default_rng(0)))

    def get(address: str, **_: Any) -> Download:
        return Download(archive)

    setattr(import_extra("requests", "a script that downloads"), "get", get)  # noqa: B010 - typed so
    return "a made graph"


def _papers(random: np.random.Generator) -> tuple[str, str]:
    """Contents: number, words, class of each paper; and pairs of a cited and a citing one."""
    labels = random.integers(CLASSES, size=PAPERS)
    words = np.zeros((PAPERS, WORDS), dtype=int)
    for paper, label in enumerate(labels):
        own = WORDS_OF_PAPER // 3
        words[paper, label * WORDS_OF_CLASS + random.integers(WORDS_OF_CLASS, size=own)] = 1
        words[paper, random.integers(WORDS, size=WORDS_OF_PAPER - own)] = 1
    contents = [
        "\t".join([str(paper), *map(str, words[paper]), f"class_{label}"])
        for paper, label in enumerate(labels)
    ]
    pairs = []
    for _ in range(CITATIONS):
        citing = int(random.integers(PAPERS))
        alike = np.flatnonzero(labels == labels[citing])
        among = alike if random.random() < OWN_CLASS else np.arange(PAPERS)
        pairs.append(f"{random.choice(among)}\t{citing}")
    return "\n".join(contents) + "\n", "\n".join(pairs) + "\n"


def _archive(contents: str, pairs: str) -> bytes:
    """A compressed archive of ``cora/cora.content`` and ``cora/cora.cites``."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, text in (("content", contents), ("cites", pairs)):
            entry = tarfile.TarInfo(f"cora/cora.{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue()
