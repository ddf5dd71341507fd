"""The recorder: arms forward passes, runs the Fisher pass, keeps the sums of statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kfc_fx.curvature.inputs import Inputs
from kfc_fx.curvature.likelihood import Likelihood
from kfc_fx.curvature.outputs import find_prediction, float_tensors, replace_tensors
from kfc_fx.errors import CaptureError, OutputError
from kfc_fx.ops.emission import fisher_pass, gate
from kfc_fx.ops.input_factors import input_share
from kfc_fx.plan.forms import FactorForms, statistic_shapes
from kfc_fx.plan.spec import BlockSpec

Fisher = Literal["sampled", "empirical"]
Samples = int | Literal["auto"] | None

SHARE, LEAST_SAMPLES = 0.5, 128
"""Of a batch, what statistics are estimated from with "auto", and the least number of examples."""


@dataclass
class Statistics:
    """Sums over all micro-batches since the last step, unnormalised.

    ``sums[block][statistic]`` is ``Σ_n Σ_t`` of outer products; ``rows[block]`` counts N·|T| of
    each group and ``examples`` N, by which the update divides.
    """

    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    examples: int = 0


@dataclass
class ForwardRecord:
    """One armed forward pass: the blocks that ran in it and their output rows."""

    rows: dict[str, list[int]] = field(default_factory=dict)
    probes: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Statistics of the blocks that need those of their input alone."""
    graphs: int = 0


class StatisticsRecorder:
    """Per-model state of statistics collection.

    ``armed`` is set by the optimizer when statistics are due. A forward pass then runs the
    emitting graphs, and the first backward pass through its output runs the Fisher pass.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.armed = False
        self.fisher: Fisher = "sampled"
        self.seed: int | None = None
        self.owner: object = None
        """Token of the optimizer that the statistics are for: the last one made."""
        self.seconds = 0.0
        """Time spent in Fisher passes so far."""
        self.samples: Samples = None
        """Examples of a forward pass that statistics are estimated from; None for all."""
        self.keep_inputs = False
        self.last_inputs: Inputs | None = None
        self.statistics = Statistics()
        self._record: ForwardRecord | None = None
        self._probes: dict[str, dict[str, Tensor]] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def recording(self) -> ForwardRecord | None:
        """The record of the armed forward pass that is running, or None."""
        return self._record

    @contextmanager
    def forward_pass(self, examples: int) -> Iterator[ForwardRecord]:
        """Run an armed forward pass of a batch: graphs emit while it lasts."""
        outer, self._record = self._record, ForwardRecord()
        try:
            with input_share(self.share(examples)):
                yield self._record
        finally:
            self._record = outer

    def share(self, examples: int) -> float:
        """The share of a batch that statistics are estimated from."""
        if self.samples is None:
            return 1.0
        own = max(LEAST_SAMPLES, SHARE * examples) if self.samples == "auto" else self.samples
        return min(1.0, own / max(1, examples))

    def probes_for(
        self, block: BlockSpec, forms: FactorForms, weight: Tensor, *, gated: bool
    ) -> tuple[Tensor, ...]:
        """Probes of a block for the running forward pass, on the weight's device."""
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        leaves = []
        cached = self._probes.setdefault(block.name, {})
        for statistic, shape in statistic_shapes(block, forms).items():
            leaf = cached.get(statistic)
            if leaf is None or (leaf.shape, leaf.device, leaf.dtype) != (
                shape,
                weight.device,
                dtype,
            ):
                leaf = torch.zeros(1, dtype=dtype, device=weight.device).expand(shape)
                cached[statistic] = leaf.requires_grad_()
            leaves.append(cached[statistic])
        assert self._record is not None
        self._record.probes[block.name] = tuple(leaves)
        return tuple(gate(leaf) for leaf in leaves) if gated else tuple(leaves)

    def note_rows(
        self,
        blocks: Sequence[BlockSpec],
        spans: Sequence[tuple[int, int]],
        rows: Sequence[int],
    ) -> None:
        """Add the row counts that a graph of the running forward pass returned: for each of its
        sites the block, the groups ``[start, stop)`` of it, and N·|T|."""
        assert self._record is not None
        for block, (start, stop), count in zip(blocks, spans, rows, strict=True):
            counts = self._record.rows.setdefault(block.name, [0] * block.groups)
            for group in range(start, stop):
                counts[group] += count

    def note_inputs(self, block: BlockSpec, statistics: Mapping[str, Tensor]) -> None:
        """Add input statistics that a graph of the running forward pass returned for a site."""
        assert self._record is not None
        _add(self._record.inputs, block.name, statistics)

    def collect(
        self, output: Any, record: ForwardRecord, statistics_of: Mapping[str, Sequence[str]]
    ) -> None:
        """Run the Fisher pass at once, with sampled targets, without a loss's backward pass."""
        prediction = find_prediction(output)
        self.likelihood.examples(prediction)
        _FisherPass(self, prediction, 0, record, statistics_of, "sampled")([None])

    def tap(
        self, output: Any, record: ForwardRecord, statistics_of: Mapping[str, Sequence[str]]
    ) -> Any:
        """Put the output tap on every differentiable tensor of the output.

        Args:
            statistics_of: block name to the names of its statistics, in probe order.

        Raises:
            CaptureError: no captured graph ran in this forward pass.
            OutputError: the output holds no prediction.
        """
        if record.graphs == 0:
            raise CaptureError(
                "the forward pass ran outside the captured graphs, so no statistics can be taken: "
                "dynamo skipped the frame or reached its recompile limit (TORCH_LOGS=recompiles "
                "shows why; torch._dynamo.config.recompile_limit raises it)"
            )
        prediction = find_prediction(output)
        self.likelihood.examples(prediction)  # raises for an output without examples
        tensors = [t for t in float_tensors(output) if t.requires_grad]
        if not tensors or not record.rows:
            return output  # nothing to differentiate: a frozen or unused part of the model
        position = _position(prediction, tensors)
        run = _FisherPass(self, prediction, position, record, statistics_of, self.fisher)
        tapped = _OutputTap.apply(run, *tensors)
        by_id = {id(old): new for old, new in zip(tensors, tapped, strict=True)}
        return replace_tensors(output, lambda t: by_id.get(id(t), t))

    def take(self) -> Statistics:
        """The sums so far; the recorder starts anew."""
        taken, self.statistics = self.statistics, Statistics()
        return taken

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of sampled targets on a device, apart from torch's global one."""
        if device not in self._generators:
            seed = torch.initial_seed() if self.seed is None else self.seed
            self._generators[device] = torch.Generator(device).manual_seed(seed % 2**63)
        return self._generators[device]

    def generator_states(self) -> dict[str, Tensor]:
        """State of every generator in use, by device."""
        return {str(d): g.get_state() for d, g in self._generators.items()}

    def set_generator_states(self, states: Mapping[str, Tensor]) -> None:
        """Continue the generators from saved states."""
        for device, state in states.items():
            self.generator(torch.device(device)).set_state(state.cpu())


class _FisherPass:
    """Runs once per forward pass, from the tap's backward."""

    def __init__(
        self,
        recorder: StatisticsRecorder,
        prediction: Tensor,
        position: int,
        record: ForwardRecord,
        statistics_of: Mapping[str, Sequence[str]],
        fisher: Fisher,
    ) -> None:
        self.fisher = fisher
        self.recorder = recorder
        self.prediction: Tensor | None = prediction
        # The user may change the tapped output, its alias, in place before backward.
        self.values = prediction.detach().clone()
        self.position = position
        self.record = record
        self.statistics_of = statistics_of

    def __call__(self, cotangents: Sequence[Tensor | None]) -> None:
        prediction, self.prediction = self.prediction, None
        if prediction is None:
            return  # a second backward pass through the same forward pass
        start = time.perf_counter()
        examples = self.recorder.likelihood.examples(prediction)
        statistics = self.recorder.statistics
        taken = dict(self.record.inputs)
        if self.record.probes:
            taken |= self._gradients(prediction, cotangents[self.position], examples)
        for block, values in taken.items():
            _add(statistics.sums, block, values)
            counts = self.record.rows[block]
            before = statistics.rows.get(block, [0] * len(counts))
            statistics.rows[block] = [sum(pair) for pair in zip(before, counts, strict=True)]
        statistics.examples += examples
        self.recorder.seconds += time.perf_counter() - start

    def _gradients(
        self, prediction: Tensor, cotangent: Tensor | None, examples: int
    ) -> dict[str, dict[str, Tensor]]:
        """Statistics by block: the gradients of the probes."""
        names = [(b, s) for b in self.record.probes for s in self.statistics_of[b]]
        probes = [probe for leaves in self.record.probes.values() for probe in leaves]
        with fisher_pass(self.recorder.share(examples)):
            values = torch.autograd.grad(
                prediction,
                probes,
                self._cotangent(prediction, cotangent),
                retain_graph=True,
                allow_unused=True,
            )
        found: dict[str, dict[str, Tensor]] = {}
        for (block, statistic), value in zip(names, values, strict=True):
            if value is not None:  # else the block ran, but the prediction does not depend on it
                found.setdefault(block, {})[statistic] = value
        return found

    @torch.no_grad()
    def _cotangent(self, prediction: Tensor, true_cotangent: Tensor | None) -> Tensor:
        likelihood = self.recorder.likelihood
        # Probabilities in half precision lose the tail that samples come from.
        wide = self.values.to(torch.promote_types(prediction.dtype, torch.float32))
        if self.fisher == "sampled":
            generator = self.recorder.generator(prediction.device)
            return likelihood.sampled_cotangent(wide, generator).to(prediction.dtype)
        if true_cotangent is None:
            raise OutputError(
                "fisher='empirical' reads the targets off the gradient at the prediction, and the "
                "loss was not computed from it; use fisher='sampled'"
            )
        return likelihood.empirical_cotangent(wide, true_cotangent).to(prediction.dtype)


class _OutputTap(torch.autograd.Function):
    """Identity; its backward runs the Fisher pass, then passes the cotangents on."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.run = run
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.run(cotangents)
        return (None, *cotangents)


def _add(sums: dict[str, dict[str, Tensor]], block: str, statistics: Mapping[str, Tensor]) -> None:
    own = sums.setdefault(block, {})
    for name, value in statistics.items():
        own[name] = own[name] + value if name in own else value


def _position(prediction: Tensor, tensors: Sequence[Tensor]) -> int:
    for position, tensor in enumerate(tensors):
        if tensor is prediction:
            return position
    raise OutputError(
        "the prediction in the model's output does not depend on any trained parameter, "
        "so it has no curvature; check that it is not detached"
    )
