"""Run by torchrun: faults that end a process, or hold it up; each prints how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F

import kfc_fx
from tests.distributed.checkpoints import examples
from tests.distributed.training import DDP, net, own_batch, step_of

STEPS = 12
SAVED_EVERY = 3
LOST = "KFC_FX_TEST_LOST"
"""Set in the environment of the processes of the machine that is lost."""


def made(distribute: str = "update", **options):
    inner = kfc_fx.compile(net())
    options.setdefault("statistics", kfc_fx.Statistics(samples=None, every=2, refresh_every=2))
    opt = kfc_fx.KFC(inner, distribute=distribute, seed=4, **options)
    inner.kfc.trace(torch.zeros(4, 2, 6, 6))
    return DDP(inner), opt


def state_of(model, opt) -> dict[str, object]:
    return dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those that were saved to their end, the last one last."""
    found = [path for path in folder.iterdir() if (path / ".metadata").exists()]
    return sorted(found, key=lambda path: int(path.name))


def restart(folder: Path, kill_at: str) -> None:
    """Train with checkpoints. Once a rank dies, in the middle of a step or of a save; or, of a
    machine that is lost for good, with the agent that would start it again."""
    model, opt = made()
    first_try = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    last = dist.get_rank() == dist.get_world_size() - 1
    dies = LOST in os.environ if kill_at == "machine" else first_try and last
    if saved := whole_checkpoints(folder):
        state = state_of(model, opt)
        dcp.load(state, checkpoint_id=saved[-1])
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
    while (step := opt.diagnostics.steps) < STEPS:
        if dies and kill_at == "step" and step == 7:
            opt._engine._exchange.send = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if dies and kill_at == "machine" and step == 7:
            opt._engine._exchange.send = lambda *_: _lose_machine()
        step_of(model, opt, *examples(step))
        done = step + 1
        if done % SAVED_EVERY == 0:
            if dies and kill_at == "save" and done == 6:
                torch.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
                from torch.distributed.checkpoint import filesystem

                filesystem.torch.save = torch.save
            dcp.save(state_of(model, opt), checkpoint_id=folder / str(done))
    if dist.get_rank() == 0:
        total = float(sum(p.detach().double().sum() for p in model.parameters()))
        resumed = saved[-1].name if saved else "0"
        ranks = dist.get_world_size()
        print(f"ended after {opt.diagnostics.steps} steps: {total!r}, from {resumed}, by {ranks}")


def _lose_machine() -> None:
    for process in (os.getppid(), os.getpid()):
        os.kill(process, signal.SIGKILL)


def late(*_: object) -> None:
    """A rank that does not come: the others end with the place they have waited in."""
    model, opt = made("refresh")
    step_of(model, opt, *own_batch(0))
    if dist.get_rank() == 1:
        time.sleep(15)
        os._exit(0)
    opt.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    started = time.monotonic()
    try:
        opt.step()
    except kfc_fx.StepError as error:
        print(f"after {time.monotonic() - started:.0f} s: {error}".splitlines()[0], flush=True)
    os._exit(0)


def alone(*_: object) -> None:
    """A step without statistics that fails on one rank alone, where nobody waits for it."""
    statistics = kfc_fx.Statistics(every=4, refresh_every=4, samples=None)
    model, opt = made("refresh", statistics=statistics)
    step = 0
    while step < 11 or opt._models[0].collector.armed:
        step_of(model, opt, *own_batch(step))
        step += 1
    engine = opt._engine
    opt.zero_grad()
    x, y = own_batch(step)
    F.cross_entropy(model(x), y).backward()
    if dist.get_rank() == 1:
        engine.apply = None  # raises a TypeError when it is called
    with contextlib.suppress(TypeError):
        opt.step()
    if dist.get_rank() == 1:
        del engine.apply
    started = time.monotonic()
    try:
        for later in range(step + 1, step + 9):
            step_of(model, opt, *own_batch(later))
    except kfc_fx.StepError as error:
        print(f"after {time.monotonic() - started:.0f} s: {error}", flush=True)
        os._exit(0)
    time.sleep(5)
    os._exit(0)


def main() -> None:
    """``ACTION FOLDER ...``."""
    action, folder, *rest = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60 if action != "late" else 8))
    {"restart": restart, "late": late, "alone": alone}[action](Path(folder), *rest)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
