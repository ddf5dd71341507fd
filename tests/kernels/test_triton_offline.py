"""Every shipped configuration compiles for every target, on tensor cores and without spilling."""

from __future__ import annotations

import os

import pytest
from packaging.version import Version

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted", allow_module_level=True)

import triton
from typer.testing import CliRunner

from kfc_fx.kernels.triton_case import KernelCase
from kfc_fx.kernels.triton_catalogue import shipped_cases
from kfc_fx.kernels.triton_offline import TARGETS, compile_case
from kfc_fx.tools.kernels_report import TARGET_NAMES, app, complaints, runs_on

# KFC_FX_COMPILE_ALL=1 compiles every case, some minutes of work, as `kfc-fx kernels` does.
COMPILE_ALL = os.environ.get("KFC_FX_COMPILE_ALL") == "1"


def default_selection() -> list[KernelCase]:
    """For each kernel its largest configuration in each dtype and mode, and its smallest in bf16.

    Registers run out in the largest first.
    """
    cases = shipped_cases()
    if COMPILE_ALL:
        return cases
    # The widest tile is for some targets only, so the widest that every target runs is here too.
    everywhere = [case for case in cases if all(runs_on(case, name) for name in TARGETS)]
    widest = {(case.kernel_name, case.dtype, case.mode): case for case in everywhere}
    last = {(case.kernel_name, case.dtype, case.mode): case for case in cases}
    chosen = [case for case in last.values() if case.dtype != "fp16"]
    first = {case.kernel_name: case for case in reversed(cases) if case.dtype == "bf16"}
    more = [case for case in widest.values() if case.dtype == "bf16"]
    return [*chosen, *(case for case in [*more, *first.values()] if case not in chosen)]


SPILLS_BEFORE_3_7 = {("im2col_gram 64x64x16 w8 s2 strided direct fp32 ieee", "cuda:80")}
"""One register more than there are, with the compiler of Triton 3.6."""

SELECTION = [
    pytest.param(case, target, id=f"{case.name} {target}")
    for case in default_selection()
    for target in TARGETS
    if runs_on(case, target)
]


@pytest.mark.parametrize(("case", "target"), SELECTION)
def test_compiles_on_tensor_cores_without_spills(case: KernelCase, target: str) -> None:
    report = compile_case(case, TARGETS[target])
    if (case.name, target) in SPILLS_BEFORE_3_7 and Version(triton.__version__) < Version("3.7"):
        assert report.spills <= 8
    else:
        assert complaints([report]) == []
    assert report.shared <= TARGETS[target].shared_bytes
    assert report.binary_size > 0


def test_each_architecture_uses_its_own_instruction() -> None:
    wide = [case for case in shipped_cases() if case.config.startswith("128x128")]
    case = next(case for case in wide if case.dtype == "bf16")
    opcodes = {name: compile_case(case, target).tensor_opcode for name, target in TARGETS.items()}
    assert opcodes["cuda:80"] == "mma.sync.aligned"
    assert opcodes["cuda:90"] == "wgmma.mma_async"
    assert opcodes["cuda:100"] == "tcgen05.mma"
    assert opcodes["hip:gfx942"].startswith("v_mfma_f32")


def test_command_prints_a_line_for_each_case() -> None:
    done = CliRunner().invoke(
        app, ["--target", "cuda:80", "--kernel", "split_reduction"], env={"COLUMNS": "160"}
    )
    assert done.exit_code == 0, done.output
    cases = [case for case in shipped_cases() if case.kernel_name == "split_reduction"]
    assert done.output.count("split_reduction") == len(cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--target", "cuda:91"], "unknown target"), (["--kernel", "gramm"], "no kernel matches")],
)
def test_command_refuses_what_it_does_not_know(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert done.exit_code == 2
    assert message in done.output


def test_command_names_every_target() -> None:
    assert tuple(TARGETS) == TARGET_NAMES
