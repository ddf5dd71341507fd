"""The faults, and what each leaves behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kfc_fx.tools.faults.checkpoints import checkpoints
from kfc_fx.tools.faults.inject import Ops, interrupt_at, out_of_memory
from kfc_fx.tools.faults.killed import killed_while_saving
from kfc_fx.tools.faults.outcome import Outcome, Reference, try_fault
from kfc_fx.tools.faults.subject import Subject, quietly

NOT_FINITE = {"nan": float("nan"), "inf": float("inf")}


# -- numbers that are not finite ---------------------------------------------------------------


def activations(scaling: str, reference: Reference) -> Iterator[Outcome]:
    """One activation of each layer in turn; but what the hyperbolic tangent makes finite again."""
    for name, value in NOT_FINITE.items():
        outcome = Outcome(f"{name} in one activation", scaling)
        for layer in ("conv", "norm", "head", *["hidden"] * (name == "nan")):

            def spoil(_: object, __: object, output: Tensor, value: float = value) -> Tensor:
                spoilt = output.clone()
                spoilt.view(-1)[0] = value
                return spoilt

            def step(subject: Subject, layer: str = layer) -> None:
                hook = subject.net.get_submodule(layer).register_forward_hook(spoil)
                try:
                    subject.step()
                finally:
                    hook.remove()

            try_fault(outcome, reference, step)
        yield outcome


def gradients(scaling: str, reference: Reference) -> Iterator[Outcome]:
    """One entry of each parameter's gradient in turn."""
    for name, value in NOT_FINITE.items():
        outcome = Outcome(f"{name} in one gradient", scaling)
        for index, _ in enumerate(reference.subject.net.parameters()):

            def step(subject: Subject, index: int = index, value: float = value) -> None:
                subject.backward()
                gradient = list(subject.net.parameters())[index].grad
                assert gradient is not None
                gradient.view(-1)[0] = value
                subject.opt.step()

            try_fault(outcome, reference, step)
        yield outcome


def statistics(scaling: str, reference: Reference) -> Iterator[Outcome]:
    """One entry of each statistic: that block's are dropped, and its last good factor stays."""
    for name, value in NOT_FINITE.items():
        outcome = Outcome(f"{name} in one statistic", scaling)
        probe = reference.again()
        probe.backward()
        sums = probe.opt._models[0].collector.sums.blocks
        for block, statistic in [(b, s) for b, own in sums.items() for s in own]:
            subject = reference.again()
            subject.backward()
            kept, number = subject.opt.factors[block].omega.clone(), subject.number
            subject.opt._models[0].collector.sums.blocks[block][statistic].view(-1)[0] = value
            outcome.tried += 1
            outcome.raised[quietly(subject.opt.step)] += 1
            dropped = subject.opt.diagnostics.dropped_statistics[block] == 1
            factor = subject.opt.factors[block].omega
            stayed = torch.allclose(factor, kept, rtol=1e-4, atol=1e-5 * float(kept.abs().max()))
            taken = subject.number == number + 1
            outcome.left["after" if dropped and stayed and taken else "neither"] += 1
            quietly(subject.step)
            outcome.goes_on += all(bool(p.isfinite().all()) for p in subject.net.parameters())
        yield outcome


# -- errors ------------------------------------------------------------------------------------


class PutThereError(Exception):
    """An error that nothing else raises."""


def errors(scaling: str, reference: Reference) -> Iterator[Outcome]:
    """An exception in the forward and the backward pass, in hooks of modules, tensors, steps."""

    hooks: dict[str, Callable[[Subject], RemovableHandle]] = {
        "forward": lambda own: own.net.hidden.register_forward_pre_hook(_raise),
        "module": lambda own: own.net.hidden.register_full_backward_hook(_raise),
        "tensor": lambda own: own.net.conv.weight.register_hook(_raise),
        "before": lambda own: own.opt.register_step_pre_hook(_raise),
        "after": lambda own: own.opt.register_step_post_hook(_raise),
    }
    for name, hooked in hooks.items():

        def step(subject: Subject, hooked: Callable[[Subject], RemovableHandle] = hooked) -> None:
            hook = hooked(subject)
            try:
                subject.step()
            finally:
                hook.remove()

        outcome = Outcome(f"an exception in a hook: {name}", scaling)
        try_fault(outcome, reference, step)
        yield outcome
    outcome = Outcome("an exception in the closure of a step", scaling)
    try_fault(outcome, reference, lambda subject: subject.opt.step(_raise))
    yield outcome


def _raise(*_: object) -> None:
    raise PutThereError


def ops(scaling: str, reference: Reference, points: int, of_step: str) -> Iterator[Outcome]:
    """An exception, and no memory, in place of any op of the backward pass or of the step."""
    rng = random.Random(0)
    makers: dict[str, Callable[[], Exception]] = {
        "an exception": PutThereError,
        "out of memory": out_of_memory,
    }
    for what, made in makers.items():
        for part, shown in (("backward", f"the backward pass of {of_step}"), ("step", of_step)):
            outcome = Outcome(f"{what} in an op of {shown}", scaling)
            count = _ops_of(reference.again(), part)
            for at in sorted(rng.sample(range(count), min(points, count))):

                def step(
                    subject: Subject,
                    at: int = at,
                    part: str = part,
                    made: Callable[[], Exception] = made,
                ) -> None:
                    with ExitStack() as stack:
                        mode = Ops(at, made())
                        if part == "backward":
                            subject.opt.zero_grad()
                            loss = subject.loss()
                            stack.enter_context(mode)
                            loss.backward()
                        else:
                            subject.backward()
                            stack.enter_context(mode)
                        subject.opt.step()

                try_fault(outcome, reference, step)
            yield outcome


def _ops_of(subject: Subject, part: str) -> int:
    mode = Ops()
    if part == "backward":
        loss = subject.loss()
        with mode:
            loss.backward()
        return mode.count
    subject.backward()
    with mode:
        subject.opt.step()
    return mode.count


def interrupts(scaling: str, reference: Reference, points: int) -> Iterator[Outcome]:
    """Ctrl-C before a line of Python, anywhere in a step."""
    outcome = Outcome("Ctrl-C in a step", scaling)
    probe = reference.again()
    probe.backward()
    with interrupt_at(None) as lines:
        probe.opt.step()
    rng = random.Random(0)
    for _ in range(points):

        def step(subject: Subject, at: int = rng.randrange(lines[0])) -> None:
            subject.backward()
            with interrupt_at(at):
                subject.opt.step()

        try_fault(outcome, reference, step)
    yield outcome


def decompositions(scaling: str, reference: Reference) -> Iterator[Outcome]:
    """Decompositions that return what is not finite: the identity takes the factor's place."""
    outcome = Outcome("a decomposition that returns NaN", scaling)

    @contextmanager
    def spoilt() -> Iterator[None]:
        own = {name: getattr(torch.linalg, name) for name in ("eigh", "qr", "cholesky_ex")}

        def spoil(name: str) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                found = own[name](*args, **kwargs)
                return type(found)([_spoilt(part) for part in found])

            return call

        with ExitStack() as stack:
            for name in own:
                stack.enter_context(mock.patch.object(torch.linalg, name, spoil(name)))
            yield

    subject = reference.again()
    subject.opt.state.clear()  # bases anew
    outcome.tried += 1
    subject.backward()
    with spoilt():
        outcome.raised[quietly(subject.opt.step)] += 1
    seen = subject.opt.diagnostics.inverse_failures.total() > 0
    fine = all(bool(p.isfinite().all()) for p in subject.net.parameters())
    outcome.left["after" if seen and fine and subject.number == 1 else "neither"] += 1
    before = float(subject.loss().detach())
    for _ in range(3):
        quietly(subject.step)
    fine = all(bool(p.isfinite().all()) for p in subject.net.parameters())
    outcome.goes_on += fine and float(subject.loss().detach()) < 2 * before
    yield outcome


def _spoilt(part: Tensor) -> Tensor:
    return torch.full_like(part, float("nan")) if part.is_floating_point() else part


def battery(scaling: str, points: int, interrupt_points: int) -> Iterator[Outcome]:
    """All faults for one scaling.

    Args:
        points: places of a fault that may be anywhere.
        interrupt_points: of Ctrl-C.
    """
    # Hooks that come and go are new graphs each time, of which dynamo takes eight otherwise.
    with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
        yield from _battery(scaling, points, interrupt_points)


def _battery(scaling: str, points: int, interrupt_points: int) -> Iterator[Outcome]:
    reference = Reference.of(scaling)
    yield from activations(scaling, reference)
    yield from gradients(scaling, reference)
    yield from statistics(scaling, reference)
    yield from errors(scaling, reference)
    yield from ops(scaling, reference, points, "statistics, refresh and update")
    plain = Reference.of(scaling, due=False)
    yield from ops(scaling, plain, points, "a step without statistics")
    yield from interrupts(scaling, reference, interrupt_points)
    yield from decompositions(scaling, reference)
    yield from checkpoints(scaling, reference, points)


def kills(times: int) -> Iterator[Outcome]:
    """A process killed while it saves: the last report is whole; a checkpoint is whole, or torch
    says that it is not."""
    for what in ("report", "checkpoint"):
        outcome = Outcome(f"a process killed in {_SAVED[what]}", "adam")
        for whole, loaded in killed_while_saving(what, times):
            outcome.tried += 1
            outcome.left["after" if whole else "neither"] += 1
            outcome.raised["" if loaded else "refused"] += 1
            outcome.goes_on += whole
        yield outcome


_SAVED = {"report": "save_report", "checkpoint": "torch.save"}
