"""``kfc-fx bench rank``: one rank of many that are not there, for real.

The rank is the busiest one of a process group of torch's that reaches nobody: what would come from
others is what it has itself. So the sizes, the work and the memory of this rank are those of a
world of any size, on one machine; the numbers that it trains with are not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn

import kfc_fx
from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.owners import busiest_share, owners_of, refresh_cost
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.inspect.update_costs import state_bytes
from kfc_fx.optim.options import Distribute
from kfc_fx.tools.bench.distributed import CollectiveCounter
from kfc_fx.tools.bench.figures import save_figures
from kfc_fx.tools.bench.step import SGD_MOMENTUM
from kfc_fx.tools.bench.trainings import Training, gpt2, torchvision
from kfc_fx.tools.failures import one_line_failures, unknown_name
from kfc_fx.tools.terminal import show

MODELS: dict[str, Callable[[int], Training]] = {
    "resnet18": lambda batch: torchvision("resnet18", batch),
    "resnet50": lambda batch: torchvision("resnet50", batch),
    "vit_l_16": lambda batch: torchvision("vit_l_16", batch),
    "gpt2": lambda batch: gpt2(batch=batch),
}
WAYS: tuple[Distribute, ...] = ("none", "refresh", "update")
RATE = 1e-5


@dataclass(frozen=True)
class RankRow:
    """What one rank of a world holds, computes and sends.

    Attributes:
        rank: the one whose share of the refreshes is largest.
        refresh_imbalance: its refresh work over the mean rank's.
        state_share: its state over that of one process.
        sgd_seconds: median step of SGD with momentum.
        plain_seconds: of KFC's steps without statistics.
        due_seconds: of those with statistics and a refresh.
        sgd_bytes: that a rank sends for the gradients.
        plain_bytes: that KFC sends besides in a step without statistics.
        due_bytes: the same of one with statistics.
        mean_step: mean step at the default intervals over SGD's, with those of the network.
    """

    model: str
    ranks: int
    rank: int
    batch: int
    distribute: str
    network: float
    refresh_imbalance: float
    state_share: float
    sgd_seconds: float
    plain_seconds: float
    due_seconds: float
    sgd_bytes: float
    plain_bytes: float
    due_bytes: float
    mean_step: float


@contextmanager
def one_rank_of(ranks: int, rank: int = 0) -> Iterator[None]:
    """A process group of which there is this rank alone, while the block runs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    wait, settle = Ranks._wait, Attempt.settle
    patched: Any = (Ranks, Attempt)
    patched[0]._wait = lambda _, work: work.wait()  # these never say that they are complete
    patched[1].settle = lambda *_: None  # what comes from others is this rank's own, cut elsewhere
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        patched[0]._wait, patched[1].settle = wait, settle


def measure(
    model: str, ranks: int, batch: int, distribute: str, network: float, rounds: int
) -> RankRow:
    """Train one model by SGD and as one rank of many by KFC, in turn."""
    torch.manual_seed(0)
    other, own = MODELS[model](batch), MODELS[model](batch)
    sgd = torch.optim.SGD(other.model.parameters(), lr=RATE, momentum=SGD_MOMENTUM)
    compiled = kfc_fx.compile(own.model)
    rank, imbalance, whole = _busiest(compiled, own, ranks)
    seconds: dict[str, list[float]] = {"sgd": [], "plain": [], "due": []}
    sent = {"sgd": 2.0 * sum(p.numel() * p.element_size() for p in own.model.parameters())}
    with one_rank_of(ranks, rank):
        opt = kfc_fx.KFC(compiled, lr=RATE, distribute=distribute)  # type: ignore[arg-type]
        _step(own, opt)
        for kind in ("due", "plain"):
            _turn_to(opt, is_due=kind == "due")
            sent[kind] = _sent_in_step(own, opt)
        _step(other, sgd)
        for kind in ("due", "plain") * rounds:
            seconds["sgd"].append(_step(other, sgd))
            _turn_to(opt, is_due=kind == "due")
            seconds[kind].append(_step(own, opt))
        assert all(p.isfinite().all() for p in own.model.parameters())
        held = _state_bytes(opt)
    every = opt.schedule.every
    of = {kind: statistics.median(found) for kind, found in seconds.items()}
    sent = {kind: count * (ranks - 1) / ranks for kind, count in sent.items()}
    gradients, step, due = (sent[kind] / (1e9 * network) for kind in ("sgd", "plain", "due"))
    mean = gradients + (of["plain"] + step) * (every - 1) / every + (of["due"] + due) / every
    return RankRow(
        model=model,
        ranks=ranks,
        rank=rank,
        batch=batch,
        distribute=distribute,
        network=network,
        refresh_imbalance=imbalance,
        state_share=held / whole,
        sgd_seconds=of["sgd"],
        plain_seconds=of["plain"],
        due_seconds=of["due"],
        sgd_bytes=sent["sgd"],
        plain_bytes=sent["plain"],
        due_bytes=sent["due"],
        mean_step=mean / (of["sgd"] + gradients),
    )


def _busiest(compiled: nn.Module, training: Training, ranks: int) -> tuple[int, float, int]:
    """The rank that refreshes most, its work over the mean rank's, and the bytes of the state of
    one process."""
    alone = kfc_fx.KFC(compiled, process_group=False)
    kfc_fx.Compilation.of(compiled).trace(training.x)
    spec = alone._engine.spec
    owners = owners_of(spec, ranks)
    work = [0] * ranks
    for stack in spec.stacks:
        for block in stack.blocks:
            work[owners[block.name]] += refresh_cost(stack, block)
    whole = sum(sum(state_bytes(spec, stack).values()) for stack in spec.stacks)
    whole += sum(2 * 4 * torch.Size(generic.shape).numel() for generic in spec.generic)
    return work.index(max(work)), ranks * busiest_share(spec, owners, ranks), whole


def _turn_to(opt: kfc_fx.KFC, *, is_due: bool) -> None:
    """Let the next step be one with statistics and a refresh, or one without, of the time after
    the early phase."""
    opt.diagnostics.steps = opt.schedule.early_phase + (not is_due)
    opt._models[0].arm()


def _step(training: Training, opt: torch.optim.Optimizer) -> float:
    """One training step; returns its seconds."""
    start = time.perf_counter()
    opt.zero_grad()
    training.loss(training.model(training.x)).backward()
    opt.step()
    return time.perf_counter() - start


def _sent_in_step(training: Training, opt: kfc_fx.KFC) -> float:
    """Bytes of KFC's collectives in one step, those of a sum twice: a rank sends them in both
    halves of it."""
    opt.zero_grad()
    training.loss(training.model(training.x)).backward()
    counter = CollectiveCounter()
    with counter:
        opt.step()
    by_name = counter.bytes_by_name.items()
    return sum(count * (2 if "allreduce" in name else 1) for name, count in by_name)


def _state_bytes(opt: kfc_fx.KFC) -> int:
    """Of this rank's blocks and of parameters without one."""
    held = opt._models[0].binding.held()
    tensors = [
        t for entry in (*held.blocks.values(), *held.generic.values()) for t in entry.values()
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def rank(
    model: Annotated[
        str, typer.Argument(help="resnet18, resnet50, vit_l_16 or gpt2.")
    ] = "resnet50",
    ranks: Annotated[int, typer.Option(min=2, help="Of the world.")] = 8,
    batch: Annotated[
        int, typer.Option(min=1, help="Images of 224 pixels, or texts of 128 words, a rank.")
    ] = 32,
    distribute: Annotated[str, typer.Option(help="refresh, update or none.")] = "update",
    network: Annotated[
        float, typer.Option(min=1e-3, help="10^9 bytes a second that a rank sends.")
    ] = 25.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of SGD and KFC.")] = 3,
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write the figures here.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks in full.")] = False,
) -> None:
    """Train one rank of a world of which nobody else is there, the one that refreshes most.

    Its times are measured on this machine, and what it sends is counted. The seconds of the network
    are these bytes over --network; nothing overlaps."""
    with one_line_failures(debug=debug):
        if model not in MODELS:
            raise unknown_name("model", model, MODELS)
        if distribute not in WAYS:
            raise unknown_name("way", distribute, WAYS)
        row = measure(model, ranks, batch, distribute, network, rounds)
    show(_text(row))
    save_figures(json_path, asdict(row))


def _text(row: RankRow) -> str:
    rank, plain, due = row.rank, row.plain_seconds, row.due_seconds
    return (
        f"{row.model}, rank {rank} of {row.ranks}, {row.batch} examples a rank, "
        f"distribute={row.distribute!r}\n"
        f"seconds: SGD {row.sgd_seconds:.3f}, KFC {plain:.3f}, with statistics {due:.3f}\n"
        f"sends, in MB: gradients {row.sgd_bytes / 1e6:.1f}, KFC {row.plain_bytes / 1e6:.1f}, "
        f"with statistics {row.due_bytes / 1e6:.1f}\n"
        f"state over that of one process: {row.state_share:.3f}\n"
        f"refreshes over those of the mean rank: {row.refresh_imbalance:.2f}\n"
        f"mean step: {row.mean_step:.3f} steps of SGD at {row.network:g} GB/s"
    )
