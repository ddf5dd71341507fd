"""The checks of one model of the zoo: compiled against uncompiled, and its statistics."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

import kfc_fx
from kfc_fx.compile import CompiledModel
from kfc_fx.curvature.outputs import float_tensors
from kfc_fx.errors import OutputError
from kfc_fx.tools.zoo_case import ModelCase
from kfc_fx.tools.zoo_statistics import check_statistics

TOLERANCE = 1e-6
"""Largest difference that passes, relative to the largest entry of the uncompiled tensor. Graphs
that run in eager mode are expected to differ by nothing at all."""

SEED = 20160611


class CheckError(Exception):
    """A model of the zoo fails a check; the message says which, and where."""


@dataclass(frozen=True)
class Observation:
    """Everything that a training step's forward and backward pass leaves behind."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class CaseReport:
    """What was found of a model that passed."""

    size: str
    parameters: int
    in_blocks: float
    """Share of the trainable parameters that are in a block."""
    blocks: int
    generic: dict[str, int]
    """Reason without names, to the number of parameter entries it holds for."""
    capture_seconds: float
    graphs: int
    graph_breaks: int
    bit_equal: bool
    largest_difference: float
    statistics: int
    """Statistics that were recorded and checked."""
    no_statistics: str
    """Why there is none, for a model whose output holds losses alone."""
    symbolic: str
    """``"yes"``, or what stops torch.fx.symbolic_trace."""


def check_case(case: ModelCase) -> CaseReport:
    """Check a model; the report of one that passes.

    Raises:
        CheckError: the compiled model differs from the uncompiled one, or a statistic is not
            what it has to be.
    """
    model = case.model
    reset = _state_of(model)
    plain = observe(model, case, reset)
    compiled = kfc_fx.compile(model, likelihood=case.likelihood)
    reset()
    started = time.perf_counter()
    compiled.trace(*case.args, **case.kwargs)
    capture_seconds = time.perf_counter() - started
    worst = compare(plain, observe(compiled, case, reset), "the compiled model")
    recorded, armed_worst = _armed_step(compiled, case, reset, plain)
    share, generic = _coverage(compiled)
    return CaseReport(
        size=case.size,
        parameters=sum(p.numel() for p in model.parameters()),
        in_blocks=share,
        blocks=len(compiled.plan.blocks),
        generic=generic,
        capture_seconds=round(capture_seconds, 2),
        graphs=compiled.revision,
        graph_breaks=sum(torch._dynamo.utils.counters["graph_break"].values()),
        bit_equal=max(worst, armed_worst) == 0,
        largest_difference=max(worst, armed_worst),
        statistics=recorded,
        no_statistics=case.loss_only,
        symbolic=_symbolic(model, reset),
    )


# -- one forward and backward pass ---------------------------------------------------------


def observe(call: nn.Module, case: ModelCase, reset: Callable[[], None]) -> Observation:
    """Outputs, gradients and buffers of one forward and backward pass from a fixed state."""
    reset()
    output = call(*case.args, **case.kwargs)
    tensors = float_tensors(output)
    _loss(tensors).backward()
    return Observation(
        {f"output {i}": t.detach() for i, t in enumerate(tensors)},
        {name: p.grad for name, p in call.named_parameters() if p.grad is not None},
        {name: buffer.clone() for name, buffer in call.named_buffers()},
    )


def _loss(tensors: list[Tensor]) -> Tensor:
    """A loss that weighs every entry of every differentiable output differently."""
    parts = [
        (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).mean()
        for t in tensors
        if t.requires_grad
    ]
    if not parts:
        raise CheckError("no output depends on a trained parameter")
    return torch.stack([part.float() for part in parts]).sum()


def _state_of(model: nn.Module) -> Callable[[], None]:
    """A function that puts buffers, gradients and random number generators back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        torch.manual_seed(SEED)
        np.random.seed(SEED)  # the global generator, which models use
        random.seed(SEED)

    return reset


def compare(plain: Observation, other: Observation, what: str) -> float:
    """The largest relative difference between two observations.

    Raises:
        CheckError: one has tensors that the other lacks, or they differ by more than the
            tolerance; the message names the worst tensor.
    """
    worst = 0.0
    for kind in ("outputs", "gradients", "buffers"):
        expected, found = getattr(plain, kind), getattr(other, kind)
        if expected.keys() != found.keys():
            names = sorted(expected.keys() ^ found.keys())
            raise CheckError(f"{kind} of {what} and of the model differ: {', '.join(names[:5])}")
        for name in expected:
            error = relative_difference(expected[name], found[name])
            if not error <= TOLERANCE:
                raise CheckError(f"{kind} of {what} are off by {error:.1e} at {name}")
            worst = max(worst, error)
    return worst


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest entry; infinite for another shape or other NaNs."""
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return float("inf")
    if torch.equal(expected, found):
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(
        expected[~finite].nan_to_num(), found[~finite].nan_to_num()
    ):
        return float("inf")
    wide, other = expected[finite].double(), found[finite].double()
    if wide.numel() == 0 or torch.equal(wide, other):
        return 0.0
    scale = max(wide.abs().max().item(), torch.finfo(torch.float32).tiny)
    return (wide - other).abs().max().item() / scale


# -- statistics ----------------------------------------------------------------------------


def _armed_step(
    compiled: CompiledModel, case: ModelCase, reset: Callable[[], None], plain: Observation
) -> tuple[int, float]:
    """Statistics that were checked in one armed pass, and its difference from the plain one."""
    recorder = compiled.recorder
    recorder.armed, recorder.seed = True, SEED
    try:
        observed = observe(compiled, case, reset)
    except OutputError as error:
        if case.loss_only:
            return 0, 0.0
        raise CheckError(f"no prediction in the output: {error}") from error
    finally:
        recorder.armed = False
    worst = compare(plain, observed, "the step with statistics")
    statistics = recorder.take()
    problems = list(check_statistics(statistics.sums))
    if problems:
        raise CheckError(f"{len(problems)} statistics are wrong: {'; '.join(problems[:3])}")
    count = sum(len(of_block) for of_block in statistics.sums.values())
    if count == 0 and compiled.plan.blocks:
        raise CheckError("no statistic was recorded")
    return count, worst


# -- what the compiler says ----------------------------------------------------------------


def _coverage(compiled: CompiledModel) -> tuple[float, dict[str, int]]:
    """Share of trainable entries in blocks; entries without one by reason."""
    sizes = {n: p.numel() for n, p in compiled.original.named_parameters() if p.requires_grad}
    plan = compiled.plan
    held = sum(sizes[name] for block in plan.blocks for name in block.parameters)
    generic: dict[str, int] = {}
    for spec in plan.generic:
        reason = " ".join(_without_names(spec.reason))
        generic[reason] = generic.get(reason, 0) + sizes[spec.name]
    ordered = sorted(generic.items(), key=lambda item: -item[1])
    return held / max(1, sum(sizes.values())), dict(ordered[:5])


def _without_names(reason: str) -> Iterator[str]:
    """The words of a reason without node names and module paths, which differ by layer."""
    words = reason.split(" at ")[0].split()
    for before, word in zip(["", *words], words, strict=False):
        if before != "node" and "." not in word:
            yield word


def _symbolic(model: nn.Module, reset: Callable[[], None]) -> str:
    """Whether torch.fx.symbolic_trace takes the model: "yes", or its error in one line."""
    reset()
    try:
        fx.symbolic_trace(model)
    except Exception as error:
        return one_line(error)
    return "yes"


def one_line(error: BaseException, limit: int = 200) -> str:
    """Type and message of an error, cut to one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:limit]
