"""What the commands print is whole, in a pipe and on a terminal of 80 columns."""

from __future__ import annotations

import ast
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

import kfc_fx.tools
from kfc_fx.inspect.plan_view import plan_view
from kfc_fx.tools import kernels_report
from kfc_fx.tools.bench import distributed as bench_distributed
from kfc_fx.tools.bench import kernels as bench_kernels
from kfc_fx.tools.bench import memory as bench_memory
from kfc_fx.tools.bench import step as bench_step
from kfc_fx.tools.bench.measure import Timing
from kfc_fx.tools.cli import app
from kfc_fx.tools.doctor import command as doctor
from kfc_fx.tools.doctor.checks import CheckResult
from kfc_fx.tools.faults import command as faults
from kfc_fx.tools.faults.outcome import Outcome
from kfc_fx.tools.losses import command as losses
from kfc_fx.tools.losses.check import LossResult
from kfc_fx.tools.race import report as race
from kfc_fx.tools.race.standings import Cell, Spread, Standing, ToTarget
from kfc_fx.tools.terminal import WholeConsole, plain_text
from kfc_fx.tools.zoo import command as zoo
from kfc_fx.tools.zoo.process import ZooRow

WIDTH = 80
KERNEL = {
    "kernel": "separable_gram",
    "config": "64x64x32 w4 s3",
    "dtype": "bfloat16",
    "mode": "ieee",
    "target": "cuda:100",
    "tensor_cores": True,
    "tensor_instructions": 1024,
    "tensor_opcode": "wgmma.mma_async.sync.aligned",
    "registers": 255,
    "spills": 0,
    "shared": 232448,
    "assembly_size": 1234567,
    "binary_size": 7654321,
}


def kernels() -> Table:
    offline = pytest.importorskip("kfc_fx.kernels.triton_offline")
    return kernels_report.table([offline.KernelReport(**KERNEL)])


def patch_grams() -> Table:
    names = ("structured", "im2col", "auto", "einconv", *bench_kernels.BASELINES)
    measured = bench_kernels.Measurement(Timing(0.125, 12.34, 11.22, 13.44), 2**30, 1e-7)
    ways = dict.fromkeys(names, measured)
    row = bench_kernels.ShapeResult("EfficientNet-B7", "32x2304x7x7 depthwise 5x5", 1, 1, ways)
    return bench_kernels.results_table([row], "Patch Gram, bfloat16, cuda")


def memories() -> Table:
    run = bench_memory.Run(12 * 10**9, 9 * 10**9, 11.25, 10.125)
    row = bench_memory.MemoryRow(
        "gpt2, 12 layers, untied", (4, 128, 50257), 163_037_184, 652_148_736, run, run
    )
    return bench_memory.table([row], 3)


def models() -> Table:
    report = {
        "size": "16x3x224x224",
        "parameters": 1_234_567_890,
        "in_blocks": 0.9876,
        "statistics": 1234,
        "bit_equal": False,
        "largest_difference": 1e-7,
        "truth_error": 1e-6,
        "compared": 1234,
        "graphs": 12,
        "graph_breaks": {"a": 345},
        "capture_seconds": 123.4,
        "symbolic": "yes",
    }
    name = "Qwen3VLMoeForConditionalGeneration"
    return zoo.models_table([ZooRow("transformers", "vision", name, "passed", report=report)])


def races() -> Group:
    spread = Spread(1.2345, 1.1234, 1.3456, 3)
    target = ToTarget("soap", 1.2345, 1234, 123.4, 1.0)
    standing = Standing(
        optimizer="kfc-spectral",
        lr=0.00123456,
        rates=(1.0, 2.0),
        diverged=(2.0,),
        curve=(1.0,),
        final=spread,
        test_loss=spread,
        test_accuracy=None,
        peak_memory=2.0**34,
        capture_seconds=1.0,
        cost=None,
        targets=(target,) * 5,
    )
    cell = Cell("gpt", 128, 60, 1000, (standing,))
    return Group(race.ends_table(cell), race.targets_table(cell))


def doctors() -> RenderableType:
    device = ("cuda:0", "NVIDIA H100 80GB HBM3, sm_90, 79 GiB", "Triton kernels, then ATen")
    table = doctor._devices(["cpu"])
    table.add_row(*device, "cuBLAS, polar factors in bfloat16")
    case = "stride 1, same padding, a long case"
    check = CheckResult("patch_gram structured", "cuda:0", case, "im2col", 1e-7, 1e-5, 12.3)
    return Group(table, doctor._checks([check]))


def collectives() -> Table:
    row = dict.fromkeys(bench_distributed.Row.__annotations__, 123_456_789)
    return bench_distributed._table([{**row, "way": "refresh"}])


def fault_rows() -> Table:
    raised = Counter({"KeyboardInterrupt": 250, "StatisticsError": 12, "OutOfMemoryError": 3})
    fault = "Ctrl-C between the statistics and the refresh"
    return faults._table([Outcome(fault, "adam", 250, Counter(before=250), raised, 250)])


def loss_rows() -> Table:
    result = LossResult("Categorical(dim=1)", "the gradient sums to [zero] over dim 1", "", 0, 1.0)
    name = "cross_entropy_with_label_smoothing_and_weights"
    return losses._table([losses.LossRow(name, "Bernoulli(output='logits')", result)])


def steps() -> Table:
    what = "step with statistics / SGD of the uncompiled network: KFC CIFAR-10, batch 128"
    return bench_step.table([bench_step.Ratio(what, 1.234, 1.123, 1.345)])


def plans() -> RenderableType:
    name = "encoder.layers.11.self_attention.rotary_embedding.inverse_frequencies"
    block = {
        "name": name,
        "kind": "transposed convolution",
        "sharing": "reduce",
        "uses": 12,
        "geometry": "3x3 stride 2 padding 1 dilation 2",
        "locations": 12544,
        "columns": 4608,
        "rows": 2048,
        "groups": 32,
        "grows_with_locations": True,
        "form": "separable",
        "method": "structured",
        "stack": "2048x4608",
        "bytes": 2**40,
        "flops": 10**15,
        "why": "structured needs 1.2 G operations, im2col 12.3 G",
    }
    reason = "used by aten.index_put_.default/without_a_rule_for_it, which no rule follows"
    generic = {"name": name, "shape": [12, 34], "reason": reason}
    return plan_view({"blocks": [block], "generic": [generic], "frozen": [], "breaks": []})


TABLES: list[Callable[[], RenderableType]] = [
    *(kernels, patch_grams, memories, models, races, doctors, collectives, fault_rows),
    *(loss_rows, steps, plans),
]


def tables(shown: RenderableType) -> Iterator[Table]:
    if isinstance(shown, Table):
        yield shown
    for part in shown.renderables if isinstance(shown, Group) else ():
        yield from tables(part)


def words(shown: RenderableType) -> set[str]:
    """Every word of every cell and heading."""
    found = set()
    for table in tables(shown):
        for column in table.columns:
            for cell in (column.header, *column.cells):
                found |= set((cell.plain if isinstance(cell, Text) else str(cell)).split())
    assert found
    return found


def missing(shown: RenderableType, printed: str) -> set[str]:
    """Words that cannot be read, each on one line."""
    return words(shown) - set(printed.split())


@pytest.mark.parametrize("build", TABLES, ids=lambda build: build.__name__)
def test_a_pipe_has_every_row_on_one_line(build):
    shown = build()
    printed = plain_text(shown)
    assert not missing(shown, printed)
    for table in tables(shown):
        cells = zip(*(column.cells for column in table.columns), strict=True)
        rows = [" ".join(map(str, row)).split() for row in cells]
        lines = [line.split() for line in printed.splitlines()]
        assert all(row in lines for row in rows)


@pytest.mark.parametrize("build", TABLES, ids=lambda build: build.__name__)
def test_a_terminal_of_80_columns_has_every_word(build):
    shown = build()
    buffer = io.StringIO()
    WholeConsole(width=WIDTH, file=buffer, force_terminal=True, color_system=None).print(shown)
    assert not missing(shown, buffer.getvalue())
    assert "…" not in buffer.getvalue()


@pytest.mark.parametrize("build", [kernels, patch_grams, models, loss_rows, plans])
def test_rich_alone_would_cut_it(build):
    """So the rows above are wide enough to test something."""
    shown = build()
    buffer = io.StringIO()
    Console(width=WIDTH, file=buffer, color_system=None).print(shown)
    assert missing(shown, buffer.getvalue())


def test_text_in_square_brackets_is_no_markup():
    table = Table("shape")
    table.add_row("[batch, time]")
    assert "[batch, time]" in plain_text(table)


@pytest.mark.parametrize("where", ["pipe", "terminal"])
def test_the_kernels_that_were_compiled_are_whole(where, monkeypatch):
    offline = pytest.importorskip("kfc_fx.kernels.triton_offline")
    report = offline.KernelReport(**KERNEL)
    monkeypatch.setattr(kernels_report, "_compile", lambda work: [report])
    terminal = {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm"}
    environment = {"COLUMNS": str(WIDTH), **(terminal if where == "terminal" else {})}
    result = CliRunner().invoke(app, ["kernels"], env=environment)
    assert result.exit_code == 0, result.output
    for text in ("separable_gram", "64x64x32", "cuda:100", "wgmma.mma_async.sync.aligned"):
        assert text in result.stdout


def test_no_command_makes_a_console_of_its_own():
    """It would cut tables; one for standard error prints lines alone."""
    own = []
    for path in Path(kfc_fx.tools.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Console":
                named = {keyword.arg for keyword in node.keywords}
                own += [] if "stderr" in named else [f"{path.name}:{node.lineno}"]
    assert not own
