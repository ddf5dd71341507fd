"""What is compiled offline: a kernel, a shipped configuration, a dtype, and a launch's types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kfc_fx.kernels.triton_configs import GramConfig

# (precision mode, Triton's name of the dtype, bytes)
GRAM_DTYPES = (
    ("half", "bf16", 2),
    ("half", "fp16", 2),
    ("tf32", "fp32", 4),
    ("ieee", "fp32", 4),
)


@dataclass(frozen=True)
class KernelCase:
    """One kernel in one shipped configuration and dtype, as a launch on a typical shape has it.

    ``arguments`` gives each run-time argument's Triton type, or its value where a launch
    specialises on one; ``divisible`` names the arguments that are multiples of 16, which a launch
    finds out by itself and an offline compile must be told. ``stage_bytes`` is the shared memory
    of one pipeline stage, by which ``stages`` is cut to a target's shared memory; a target with
    less than ``least_bytes`` of it never runs the case.
    """

    kernel_name: str
    kernel: Any
    config: str
    dtype: str
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    divisible: frozenset[str]
    warps: int
    stages: int
    stage_bytes: int = 0
    least_bytes: int = 0
    mode: str = ""

    @property
    def name(self) -> str:
        """Identifies the case in reports and tests."""
        return f"{self.kernel_name} {self.config} {self.dtype} {self.mode}".strip()

    @property
    def tensor_cores(self) -> bool:
        """Whether the kernel is to multiply on tensor cores."""
        return self.mode in ("half", "tf32")


def argument_types(names: Mapping[str, str]) -> dict[str, str]:
    """From each Triton type's arguments, separated by spaces, to each argument's type."""
    return {name: kind for kind, text in names.items() for name in text.split()}


def gram_cases(
    kernel_name: str,
    kernel: Any,
    configs: Mapping[str, tuple[GramConfig, ...]],
    variants: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]],
    divisible: frozenset[str],
) -> Iterator[KernelCase]:
    """Every configuration in every dtype and variant of a Gram kernel.

    A variant gives arguments and constants beyond those that the dtype and the tile decide:
    ``x``, ``PRECISION``, ``BLOCK_K`` and ``BLOCK``, or ``BLOCK_M`` and ``BLOCK_N``.
    """
    for mode, dtype, itemsize in GRAM_DTYPES:
        for config in configs[mode]:
            for label, (arguments, constants) in variants.items():
                yield KernelCase(
                    kernel_name,
                    kernel,
                    f"{config.name} {label}",
                    dtype,
                    {"x": f"*{dtype}", **arguments},
                    {**_tile(config, kernel.arg_names), "PRECISION": _precision(mode), **constants},
                    divisible,
                    config.warps,
                    config.stages,
                    config.stage_bytes(itemsize),
                    config.least_stages * config.stage_bytes(itemsize),
                    mode,
                )


def _tile(config: GramConfig, names: list[str]) -> dict[str, int]:
    tile = {"BLOCK_K": config.block_k}
    if "BLOCK" in names:
        return tile | {"BLOCK": config.block_m}
    return tile | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}


def _precision(mode: str) -> str:
    return "ieee" if mode == "ieee" else "tf32"
