"""The list of torch's pages that intersphinx reads, made from a file of names."""

from __future__ import annotations

import zlib
from pathlib import Path

HEAD = """# Sphinx inventory version 2
# Project: PyTorch
# Version: stable
# The remainder of this file is compressed using zlib.
"""


def write_inventory(names: Path, to: Path) -> str:
    """Write an inventory of version 2.

    Args:
        names: a file of lines ``role name page``, as in ``class torch.nn.Module
            generated/torch.nn.Module.html``.
        to: the inventory that is written.

    Returns:
        Its path, as intersphinx takes it.
    """
    lines = [line.split() for line in names.read_text(encoding="utf-8").splitlines() if line]
    entries = "".join(f"{name} py:{role} 1 {page}#$ -\n" for role, name, page in lines)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(HEAD.encode() + zlib.compress(entries.encode()))
    return str(to)
