"""The checks of one model of the zoo: compiled against uncompiled, and its statistics."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

import kfc_fx
from kfc_fx.errors import OutputError, first_line
from kfc_fx.statistics.likelihoods.named import NAMED
from kfc_fx.statistics.outputs import find_prediction
from kfc_fx.statistics.request import Fisher, StatisticsRequest
from kfc_fx.statistics.sums import BlockSums
from kfc_fx.tools.zoo.case import ModelCase
from kfc_fx.tools.zoo.compare import (
    SEED,
    CheckError,
    Observation,
    compare,
    loss_of,
    observe,
    starting_state,
)
from kfc_fx.tools.zoo.layer_truth import LayerTruth, problems, watching_layers
from kfc_fx.tools.zoo.statistics import check_statistics


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
    graph_breaks: dict[str, int]
    """Dynamo's reason to how often it broke the graph for it."""
    bit_equal: bool
    largest_difference: float
    statistics: int
    """Statistics that were recorded and checked."""
    compared: int
    """Those of plain layers that were compared with what hooks see on the uncompiled model."""
    truth_error: float
    """The largest relative difference of one of these, under both Fisher options."""
    silent_blocks: int
    """Blocks without any: the prediction does not depend on them."""
    symbolic: str
    """``"yes"``, or what stops torch.fx.symbolic_trace."""


def check_case(case: ModelCase) -> CaseReport:
    """Check a model; the report of one that passes.

    Raises:
        CheckError: the compiled model differs from the uncompiled one, or a statistic is not
            what it has to be.
    """
    model = case.model
    breaks_before = Counter(torch._dynamo.utils.counters["graph_break"])
    reset = starting_state(model)
    plain = observe(model, case, reset)
    named = NAMED[case.likelihood](output=plain.prediction or None)
    compiled = kfc_fx.compile(model, likelihood=named)
    reset()
    started = time.perf_counter()
    compilation = kfc_fx.Compilation.of(compiled)
    compilation.trace(*case.args, **case.kwargs)
    capture_seconds = time.perf_counter() - started
    worst = compare(plain, observe(compiled, case, reset), "the compiled model")
    armed = _armed_step(compiled, case, reset, plain)
    sums, armed_worst = armed.sums, armed.difference
    share, generic = _coverage(compiled)
    return CaseReport(
        size=case.size,
        parameters=sum(p.numel() for p in model.parameters()),
        in_blocks=share,
        blocks=len(compilation.plan.blocks),
        generic=generic,
        capture_seconds=round(capture_seconds, 2),
        graphs=len(compilation.plan.graphs),
        graph_breaks=_graph_breaks(breaks_before),
        bit_equal=max(worst, armed_worst) == 0,
        largest_difference=max(worst, armed_worst),
        statistics=sum(len(of_block) for of_block in sums.values()),
        compared=armed.compared,
        truth_error=armed.truth_error,
        silent_blocks=len(compilation.plan.blocks) - len(sums),
        symbolic=_symbolic(model, reset),
    )


# -- statistics ----------------------------------------------------------------------------


FISHERS: tuple[Fisher, ...] = ("sampled", "empirical")


@dataclass(frozen=True)
class ArmedStep:
    """What passes with statistics left behind."""

    sums: BlockSums
    difference: float
    """The largest from the plain pass."""
    compared: int
    truth_error: float


def _armed_step(
    compiled: nn.Module,
    case: ModelCase,
    reset: Callable[[], None],
    plain: Observation,
) -> ArmedStep:
    """Passes with statistics of sampled targets, and of the loss's own gradient where the targets
    can be read off that: of classes."""
    # The loss weighs all outputs, whatever the model is for.
    warnings.filterwarnings("ignore", ".* does not fit the loss", kfc_fx.KfcWarning)
    warnings.filterwarnings("ignore", "the model's input leads with", kfc_fx.KfcWarning)
    passes: dict[Fisher, ArmedStep] = {}
    for fisher in FISHERS if case.likelihood == "categorical" else FISHERS[:1]:
        known = passes["sampled"].sums if passes else None
        passes[fisher] = _armed_pass(compiled, case, reset, plain, fisher, known)
    own = passes.get("empirical", passes["sampled"])
    if missing := set(passes["sampled"].sums) - set(own.sums):
        raise CheckError(
            f"the loss's own pass recorded no statistic of {', '.join(sorted(missing))}"
        )
    return ArmedStep(
        passes["sampled"].sums,
        max(own.difference for own in passes.values()),
        sum(own.compared for own in passes.values()),
        max(own.truth_error for own in passes.values()),
    )


def _armed_pass(
    compiled: nn.Module,
    case: ModelCase,
    reset: Callable[[], None],
    plain: Observation,
    fisher: Fisher,
    known: BlockSums | None,
) -> ArmedStep:
    # The loss may be of any output.
    request = StatisticsRequest(fisher=fisher, scale_free=True, seed=SEED)
    compilation = kfc_fx.Compilation.of(compiled)
    collector = compilation.attach(request)
    collector.arm()
    try:
        observed = observe(compiled, case, reset)
    except OutputError as error:
        raise CheckError(f"no prediction in the output: {error}") from error
    finally:
        collector.arm(False)
    worst = compare(plain, observed, "the step with statistics")
    del observed  # of a large model gradients are most of the memory
    compiled.zero_grad()
    sums = collector.take().blocks
    wrong = list(check_statistics(sums))
    if wrong:
        raise CheckError(f"{len(wrong)} statistics are wrong: {'; '.join(wrong[:3])}")
    if compilation.plan.blocks and not sums:
        raise CheckError("no statistic was recorded")
    scale = 1.0 if fisher == "sampled" else None
    truth = _truth(compiled, case, reset, fisher)
    found, truth_error, compared = problems(
        compilation.plan, sums, truth, scale, known_inputs=known
    )
    if found:
        raise CheckError(f"{fisher}: {len(found)} differ from the truth: {'; '.join(found[:3])}")
    return ArmedStep(sums, worst, compared, truth_error)


def _truth(
    compiled: nn.Module, case: ModelCase, reset: Callable[[], None], fisher: Fisher
) -> LayerTruth:
    """What hooks on the uncompiled model see in the same pass."""
    compilation = kfc_fx.Compilation.of(compiled)
    compilation.remove()
    try:
        with watching_layers(compiled) as truth:
            reset()
            output = compiled(*case.args, **case.kwargs)
            if fisher == "empirical":
                loss_of(output).backward()
            else:
                prediction = find_prediction(output)
                generator = torch.Generator(prediction.device).manual_seed(SEED)
                wide = torch.promote_types(prediction.dtype, torch.float32)
                values = prediction.detach().to(wide)
                assert compilation.likelihood is not None
                cotangent = compilation.likelihood.sampled_cotangent(values, generator)
                prediction.backward(cotangent.to(prediction.dtype))
    finally:
        compilation.install()
    reset()
    return truth


# -- what the compiler says ----------------------------------------------------------------


def _coverage(compiled: nn.Module) -> tuple[float, dict[str, int]]:
    """Share of trainable entries in blocks; entries without one by reason."""
    sizes = {n: p.numel() for n, p in compiled.named_parameters() if p.requires_grad}
    plan = kfc_fx.Compilation.of(compiled).plan
    held = sum(sizes[name] for block in plan.blocks for name in block.parameters)
    generic: dict[str, int] = {}
    for spec in plan.generic:
        reason = without_names(spec.reason)
        generic[reason] = generic.get(reason, 0) + sizes[spec.name]
    ordered = sorted(generic.items(), key=lambda item: -item[1])
    return held / max(1, sum(sizes.values())), dict(ordered[:5])


def without_names(reason: str) -> str:
    """A reason without node names and module paths, which differ by layer."""
    reason = re.sub(r"node \S+ \(([^)]*)\)", r"\1", reason)
    reason = re.sub(r" at [\w.]* ?\(\w*\)", "", reason)
    return re.sub(r"(block for it) \(.*\)", r"\1", reason)


def _graph_breaks(before: Counter[str]) -> dict[str, int]:
    """What dynamo has counted since, by the first line of its reason."""
    found: dict[str, int] = {}
    since = Counter(torch._dynamo.utils.counters["graph_break"]) - before
    for reason, count in since.items():
        line = first_line(reason)
        found[line] = found.get(line, 0) + count
    return found


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
    text = " ".join(str(error).split()).partition(" Set TORCHDYNAMO_VERBOSE")[0]
    return f"{type(error).__name__}: {text}"[:limit]
