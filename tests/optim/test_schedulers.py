"""Schedulers of torch, every one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import lr_scheduler

from tests.models import IMAGES, LABELS, assert_equal, backward, make, parameters


@pytest.mark.parametrize(
    ("build", "rates"),
    [
        (lambda o: lr_scheduler.StepLR(o, 2, 0.1), [0.01, 0.01, 0.001, 0.001]),
        (
            lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
            [0.01, 0.005, 0.01 / 3, 0.0025],
        ),
        (lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 2), [0.005, 0.0075, 0.01, 0.01]),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 4), None),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.01, 8, cycle_momentum=False), None),
    ],
    ids=["step", "lambda", "linear", "cosine", "one-cycle"],
)
def test_a_scheduled_run_equals_one_whose_rate_is_set_by_hand(build, rates):
    compiled, opt = make()
    scheduler = build(opt)
    used = []
    for step in range(4):
        used.append(scheduler.get_last_lr()[0])
        backward(compiled, IMAGES[step:], LABELS[step:])
        opt.step()
        scheduler.step()
        opt.zero_grad()
    if rates is not None:
        assert used == pytest.approx(rates)
    assert len(set(used)) > 1
    by_hand, plain = make()
    for step in range(4):
        plain.param_groups[0]["lr"] = used[step]
        backward(by_hand, IMAGES[step:], LABELS[step:])
        plain.step()
        plain.zero_grad()
    assert_equal(parameters(compiled), parameters(by_hand))


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, 8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, 3),
}


def test_every_scheduler_of_torch_is_tried():
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_the_rate_of_every_step_and_resumes(name):
    def take(compiled, opt, scheduler, start, stop):
        for step in range(start, stop):
            backward(compiled, IMAGES[step:], LABELS[step:])
            opt.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            opt.zero_grad()
            used.append(opt.param_groups[0]["lr"])

    used: list[float] = []
    compiled, opt = make()
    scheduler = SCHEDULERS[name](opt)
    take(compiled, opt, scheduler, 0, 3)
    saved = copy.deepcopy((compiled.state_dict(), opt.state_dict(), scheduler.state_dict()))
    take(compiled, opt, scheduler, 3, 5)
    assert len(set(used)) > 1
    other, its = make()
    again = SCHEDULERS[name](its)
    for target, state in zip((other, its, again), saved, strict=True):
        target.load_state_dict(state)
    take(other, its, again, 3, 5)
    assert used[-2:] == used[-4:-2]
    assert_equal(parameters(other), parameters(compiled))
