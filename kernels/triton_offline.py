"""Compile kernels for a named GPU on a machine that has none, and read what the compiler made.

The report is of the binary itself: tensor-core instructions from the assembly, registers and
stack from the resource table of the cubin (``cuobjdump`` ships with Triton) or from the metadata
of the AMD code object.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kfc_fx.kernels.triton_case import KernelCase


@dataclass(frozen=True)
class Target:
    """A GPU that code is compiled for, and the shared memory that one program may have."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS = {
    target.name: target
    for target in (
        Target("cuda:80", "cuda", 80, 32, 166_912),
        Target("cuda:90", "cuda", 90, 32, 232_448),
        Target("cuda:100", "cuda", 100, 32, 232_448),
        Target("hip:gfx942", "hip", "gfx942", 64, 65_536),
    )
}

TENSOR_CORE_INSTRUCTION = re.compile(
    r"\b(mma\.sync\.aligned|wgmma\.mma_async|tcgen05\.mma|v_mfma_\w+)\b"
)


@dataclass(frozen=True)
class KernelReport:
    """What one compile produced; sizes in bytes, ``spills`` in registers or bytes of stack."""

    kernel: str
    config: str
    dtype: str
    mode: str
    target: str
    tensor_cores: bool
    tensor_instructions: int
    tensor_opcode: str
    registers: int
    spills: int
    shared: int
    assembly_size: int
    binary_size: int


def compile_case(case: KernelCase, target: Target) -> KernelReport:
    """Compile one case for one target.

    Raises:
        triton.CompilationError: the kernel does not compile there.
        ValueError: kernels are being interpreted, so there is nothing to compile.
    """
    if not hasattr(case.kernel, "cache_key"):
        raise ValueError("unset TRITON_INTERPRET to compile kernels: they were made interpreted")
    source = ASTSource(case.kernel, *_source_arguments(case))
    options = {"num_warps": case.warps, "num_stages": _stages(case, target)}
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    compiled = triton.compile(source, target=gpu, options=options)
    assembly_kind, binary_kind = (
        ("ptx", "cubin") if target.backend == "cuda" else ("amdgcn", "hsaco")
    )
    assembly, binary = compiled.asm[assembly_kind], compiled.asm[binary_kind]
    opcodes = TENSOR_CORE_INSTRUCTION.findall(assembly)
    registers, spills = _cubin(binary) if target.backend == "cuda" else _code_object(assembly)
    return KernelReport(
        case.kernel_name,
        case.config,
        case.dtype,
        case.mode,
        target.name,
        case.tensor_cores,
        len(opcodes),
        opcodes[0] if opcodes else "",
        registers,
        spills,
        compiled.metadata.shared,
        len(assembly),
        len(binary),
    )


def _source_arguments(case: KernelCase) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes in the form of ``ASTSource``."""
    names: list[str] = case.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for place, name in enumerate(names):
        kind = case.constants[name] if name in case.constants else case.arguments[name]
        if name in case.constants or not isinstance(kind, str):
            signature[name] = "constexpr"
            constants[(place,)] = kind
            continue
        signature[name] = kind
        if kind.startswith("*") or name in case.divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _stages(case: KernelCase, target: Target) -> int:
    if case.stage_bytes == 0:
        return case.stages
    return max(1, min(case.stages, target.shared_bytes // case.stage_bytes))


def _cubin(binary: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory, which only spills use here."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [tool, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _code_object(assembly: str) -> tuple[int, int]:
    """Vector registers a thread, and vector registers spilled."""
    numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly))
    return int(numbers["vgpr_count"]), int(numbers["vgpr_spill_count"])
