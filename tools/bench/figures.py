"""What was measured, in a file."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kfc_fx.tools.terminal import write


def save_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, and what they were measured on; nothing where there is no path.

    Raises:
        CommandError: the file cannot be written.
    """
    if path is None:
        return
    measured_on = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    write(path, json.dumps({**measured_on, **figures}, indent=1) + "\n")
