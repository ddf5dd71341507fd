"""Run the generated step through torch.compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kfc_fx.codegen.text.source import UpdateProgram
from kfc_fx.engine.step_inputs import Number, StepInputs

STEP_FUNCTIONS = ("precondition", "apply")
"""Those of every step; the others decompose matrices, which inductor does not generate code for."""


def compile_step(program: UpdateProgram) -> None:
    """Replace the functions of every step by their compiled ones, each a single graph."""
    for name in STEP_FUNCTIONS:
        if name in program.functions:
            function = program.functions[name]
            program.functions[name] = torch.compile(function, fullgraph=True, dynamic=False)


def with_tensors(inputs: StepInputs, device: str) -> StepInputs:
    """Numbers that change from step to step as tensors: as numbers they would be fixed in the
    compiled code, and each new one would cost a compilation."""

    def listed(values: Any, dtype: torch.dtype = torch.float32) -> Any:
        given = isinstance(values, list)
        return [_scalar(value, device, dtype) for value in values] if given else values

    return replace(
        inputs,
        step=_scalar(inputs.step, device),
        generic_rates=listed(inputs.generic_rates),
        # 1 − momentum would lose digits in single precision.
        generic_momentum=listed(inputs.generic_momentum, torch.float64),
        shrink=listed(inputs.shrink),
    )


def _scalar(value: Number, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    # A fill takes its number along; a copy from the host would wait for the device.
    return torch.full((), float(value), dtype=dtype, device=device)
