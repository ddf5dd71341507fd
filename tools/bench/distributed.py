"""``kfc-fx bench distributed``: calls, bytes and time of the collectives of a training step."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kfc_fx
from kfc_fx.tools.bench.figures import save_figures
from kfc_fx.tools.bench.step import batch, resnet18
from kfc_fx.tools.terminal import output_console

WAYS = ("none", "refresh", "update", "shard")
EVERY = 3
EARLY, STEPS = 12, 12
"""Steps in which statistics are frequent, and those after them, which count."""


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that are called while it lasts, and the bytes of their inputs.

    ``torch.distributed.tensor.debug.CommDebugMode`` counts calls alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes_by_name: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        """Of the inputs of all calls."""
        return sum(self.bytes_by_name.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one call, and make it."""
        space, _, rest = str(func).partition(".")
        if space in ("c10d", "_c10d_functional"):
            name = rest.partition(".")[0]
            if name not in ("wait_tensor", "barrier"):
                self.calls[name] += 1
                tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
                sizes = (t.numel() * t.element_size() for t in tensors)
                self.bytes_by_name[name] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Row:
    """One way to distribute, on some ranks; bytes and seconds are of rank 0."""

    way: str
    ranks: int
    step_calls: int
    """Collectives of KFC in a step without statistics."""
    due_calls: int
    """In a step with statistics."""
    step_bytes: int
    due_bytes: int
    gradient_bytes: int
    """Of the collectives of ``DistributedDataParallel`` or ``fully_shard`` in a backward pass."""
    state_numbers: int
    """Numbers of the blocks' state that this rank holds."""
    step_seconds: float
    """Median step without statistics."""
    due_seconds: float
    waiting_share: float
    """Of the time of all steps, that KFC waits in its collectives."""
    graphs: int
    """Frames that dynamo compiled after the warm-up."""


def distributed(
    ranks: Annotated[int, typer.Option(min=2, help="Processes on this machine.")] = 2,
    size: Annotated[int, typer.Option(min=1, help="Images a rank.")] = 4,
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all rows here.")
    ] = None,
) -> None:
    """Train ResNet-18 on images of 32 pixels by some processes of this machine, by every way to
    share the work, and count what they exchange. Times are of processes that share a processor."""
    console = output_console()
    rows = []
    for way in WAYS:
        with console.status(way), tempfile.TemporaryDirectory() as folder:
            spawn(_worker, args=(ranks, way, size, folder), nprocs=ranks)
            rows.append(json.loads((Path(folder) / "row.json").read_text()))
    console.print(_table(rows))
    save_figures(json_path, {"images": size, "rows": rows})


def _worker(rank: int, ranks: int, way: str, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    row = _measured(way, rank, ranks, size)
    if rank == 0:
        (Path(folder) / "row.json").write_text(json.dumps(asdict(row)))
    dist.barrier()
    dist.destroy_process_group()


def _measured(way: str, rank: int, ranks: int, size: int) -> Row:
    torch.manual_seed(0)
    model: nn.Module = resnet18()
    if way == "shard":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (ranks,))  # type: ignore[attr-defined]
        for part in (model.layer1, model.layer2, model.layer3, model.layer4, model):
            fully_shard(part, mesh=mesh)  # type: ignore[arg-type]
    kfc_fx.compile(model)
    every = kfc_fx.Statistics(every=EVERY, refresh_every=EVERY)
    distribute: Any = "update" if way == "shard" else way
    opt = kfc_fx.KFC(model, statistics=every, distribute=distribute, seed=0)
    run = model if way == "shard" else nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank + 1)
    x, y = batch(size, 32)
    kfc_fx.Compilation.of(model).trace(x)
    waited = _timed_waits(opt)
    plain: list[tuple[CollectiveCounter, float]] = []
    due: list[tuple[CollectiveCounter, float]] = []
    gradient_bytes, graphs = 0, 0
    for step in range(EARLY + STEPS):
        if step == EARLY:
            graphs, waited[0] = _compiled(), 0.0
            plain, due = [], []
        is_due = opt.schedule.statistics_due(opt.diagnostics.steps)
        start = time.perf_counter()
        opt.zero_grad()
        outside = CollectiveCounter()
        loss = F.cross_entropy(run(x), y)  # dynamo captures nothing within a dispatch mode
        with outside:
            loss.backward()
        gradient_bytes = outside.bytes
        own = CollectiveCounter()
        with own:
            opt.step()
        (due if is_due else plain).append((own, time.perf_counter() - start))
    seconds = sum(taken for _, taken in (*plain, *due))
    held = opt._models[0].binding.held()
    numbers = sum(v.numel() for block in held.blocks.values() for v in block.values())
    return Row(
        way=way,
        ranks=ranks,
        step_calls=sum(plain[-1][0].calls.values()),
        due_calls=sum(due[-1][0].calls.values()),
        step_bytes=plain[-1][0].bytes,
        due_bytes=due[-1][0].bytes,
        gradient_bytes=gradient_bytes,
        state_numbers=numbers,
        step_seconds=statistics.median(taken for _, taken in plain),
        due_seconds=statistics.median(taken for _, taken in due),
        waiting_share=waited[0] / seconds,
        graphs=_compiled() - graphs,
    )


def _timed_waits(opt: kfc_fx.KFC) -> list[float]:
    """Seconds that the optimizer waits in its collectives, in a list of one."""
    total = [0.0]
    wait = opt._ranks._wait

    def timed(work: Any) -> None:
        start = time.perf_counter()
        wait(work)
        total[0] += time.perf_counter() - start

    opt._ranks._wait = timed  # type: ignore[method-assign]
    return total


def _compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption="a step/a step with statistics, of one rank")
    for name in ("way", "calls", "MB", "gradient MB", "state M", "seconds", "waits", "compiled"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['step_calls']}/{row['due_calls']}",
            f"{row['step_bytes'] / 1e6:.1f}/{row['due_bytes'] / 1e6:.1f}",
            f"{row['gradient_bytes'] / 1e6:.1f}",
            f"{row['state_numbers'] / 1e6:.1f}",
            f"{row['step_seconds']:.2f}/{row['due_seconds']:.2f}",
            f"{100 * row['waiting_share']:.1f}%",
            str(row["graphs"]),
        )
    return table
