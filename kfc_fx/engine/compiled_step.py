"""Run the generated step through torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kfc_fx.codegen.text.source import UpdateProgram

STEP_FUNCTIONS = ("precondition", "apply")
"""Those of every step; the others decompose matrices, which inductor does not generate code for."""


def compile_step(program: UpdateProgram) -> None:
    """Replace the functions of every step by their compiled ones, each a single graph."""
    for name in STEP_FUNCTIONS:
        if name in program.functions:
            function = program.functions[name]
            program.functions[name] = torch.compile(function, fullgraph=True, dynamic=False)


def tensor_arguments(given: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Numbers that change from step to step as tensors: as numbers they would be fixed in the
    compiled code, and each new one would cost a compilation."""
    found: dict[str, Any] = {"step": _scalar(given["step"], device)}
    found["lr"] = {**given["lr"], "generic": [_scalar(r, device) for r in given["lr"]["generic"]]}
    if "shrink" in given:
        found["shrink"] = [_scalar(value, device) for value in given["shrink"]]
    return found


def _scalar(value: float, device: str) -> torch.Tensor:
    # A fill takes its number along; a copy from the host would wait for the device.
    return torch.full((), value, dtype=torch.float32, device=device)
