"""For several ranks: save on some ranks, resume on as many, more, fewer or one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

import kfc_fx
from tests.distributed.launch import start
from tests.distributed.training import DDP, net, step_of

STEPS = 6
CASES = [
    ("eigen", "refresh", "nested"),
    ("adam", "update", "torch"),
    ("adam", "update", "flat async"),
    ("inverse", "update", "nested"),
]
"""Scaling, what is divided, and how it is saved."""


def examples(step: int) -> tuple[Tensor, Tensor]:
    """The batch of all ranks, each of which takes its part."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 2, 6, 6, generator=generator)
    y = torch.randint(3, (12,), generator=generator)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return x.tensor_split(ranks)[rank], y.tensor_split(ranks)[rank]


def made(scaling: str, distribute: str):
    inner = kfc_fx.compile(net())
    statistics = kfc_fx.Statistics(samples=None, fisher="sampled", every=2, refresh_every=2)
    opt = kfc_fx.KFC(
        inner, scaling=scaling, statistics=statistics, distribute=distribute, seed=4, average=5.0
    )
    return (DDP(inner) if dist.get_world_size() > 1 else inner), opt


def describe(model: nn.Module, opt: kfc_fx.KFC) -> dict[str, object]:
    """Sums by which states are compared between programs."""
    numbers = [float(p.detach().double().sum()) for p in model.parameters()]
    own = {name: float(f.omega.double().sum()) for name, f in opt.factors.items()}
    found: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, own)
    factors = {name: value for each in found for name, value in each.items()}
    with opt.averaged():
        averaged = [float(p.detach().double().sum()) for p in model.parameters()]
    counts = [opt.diagnostics.steps, opt.diagnostics.statistics_steps]
    return {"parameters": numbers, "averaged": averaged, "factors": factors, "counts": counts}


def save(model: nn.Module, opt: kfc_fx.KFC, way: str, path: Path) -> None:
    if way == "torch":
        opt.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            inner = getattr(model, "module", model)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": inner.state_dict(), "opt": opt.state_dict()}, path)
        return
    options = StateDictOptions(flatten_optimizer_state_dict=way.startswith("flat"))
    state = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options), strict=True))
    if way.endswith("async"):
        dcp.async_save(state, checkpoint_id=path).result()
    else:
        dcp.save(state, checkpoint_id=path)


def load(model: nn.Module, opt: kfc_fx.KFC, way: str, path: Path) -> None:
    inner = getattr(model, "module", model)
    if way == "torch":
        saved = torch.load(path, weights_only=True)
        inner.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        inner.kfc.trace(torch.zeros(4, 2, 6, 6))
        return
    options = StateDictOptions(flatten_optimizer_state_dict=way.startswith("flat"))
    inner.kfc.trace(torch.zeros(4, 2, 6, 6))
    state = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options), strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"], options=options
    )


def main() -> None:
    """``save FOLDER`` trains and saves; ``resume FOLDER`` goes on; each prints what there is."""
    action, folder = sys.argv[1:]
    start()
    printed = {}
    for scaling, distribute, way in CASES:
        torch._dynamo.reset()
        model, opt = made(scaling, distribute)
        key = f"{scaling} {distribute} {way}"
        path = Path(folder) / key.replace(" ", "-")
        if action == "save":
            for step in range(STEPS):
                step_of(model, opt, *examples(step))
            save(model, opt, way, path)
        else:
            load(model, opt, way, path)
        printed[f"{key} saved"] = describe(model, opt)
        for step in range(STEPS, STEPS + 4):
            step_of(model, opt, *examples(step))
        printed[f"{key} resumed"] = describe(model, opt)
    if dist.get_rank() == 0:
        print(json.dumps(printed))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
