"""Checkpoints that are not whole, or of something else: they are refused, and change nothing."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import torch

from kfc_fx.tools.faults.outcome import Outcome, Reference, Step, try_fault
from kfc_fx.tools.faults.subject import Subject


def checkpoints(scaling: str, reference: Reference, points: int) -> Iterator[Outcome]:
    """Checkpoints that are cut off, lack a tensor, or are of another optimizer or version."""
    saved = reference.saved["opt"]
    file = io.BytesIO()
    torch.save(saved, file)
    whole, rng = file.getvalue(), random.Random(0)

    outcome = Outcome("a checkpoint that was cut off", scaling)
    for _ in range(points):
        part = whole[: rng.randrange(len(whole))]

        def step(subject: Subject, part: bytes = part) -> None:
            subject.opt.load_state_dict(torch.load(io.BytesIO(part), weights_only=True))

        _try_load(outcome, reference, step)
    yield outcome

    outcome = Outcome("a checkpoint that lacks a tensor", scaling)
    for key, entry in saved["state"].items():
        for name in entry:
            if name in ("step", "frozen"):
                continue
            lacking = {
                k: {n: v for n, v in e.items() if (k, n) != (key, name)}
                for k, e in saved["state"].items()
            }
            _try_load(outcome, reference, _loading({**saved, "state": lacking}))
    yield outcome

    outcome = Outcome("a checkpoint of another optimizer or version", scaling)
    net = reference.subject.net
    others: list[torch.optim.Optimizer] = [torch.optim.SGD(net.parameters(), lr=0.1)]
    others.append(torch.optim.AdamW(net.parameters()))
    foreign = [other.state_dict() for other in others]
    for text in ("{", '{"version": 99, "models": []}', '{"version": 1, "models": []}', "[]"):
        groups = [{**group, "kfc": text} for group in saved["param_groups"]]
        foreign.append({**saved, "param_groups": groups})
    for given in foreign:
        _try_load(outcome, reference, _loading(given))
    yield outcome


def _loading(state: dict[str, Any]) -> Step:
    return lambda subject: subject.opt.load_state_dict(state)


def _try_load(outcome: Outcome, reference: Reference, step: Step) -> None:
    """A load that must be refused."""
    raised = outcome.raised.total() - outcome.raised[""]
    try_fault(outcome, reference, step)
    if outcome.raised.total() - outcome.raised[""] == raised:
        outcome.left["neither"] += 1  # it was taken
        outcome.goes_on -= 1
