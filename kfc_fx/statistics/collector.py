"""The recorder: arms forward passes, taps their outputs, keeps the sums of statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from kfc_fx.errors import OutputError
from kfc_fx.plan.forms import FactorForms, quadratic_statistic, statistic_shapes
from kfc_fx.plan.spec import BlockSpec
from kfc_fx.statistics.fisher_pass import FisherPass
from kfc_fx.statistics.gradient_pass import GradientPass
from kfc_fx.statistics.inputs import Inputs
from kfc_fx.statistics.likelihood import Likelihood
from kfc_fx.statistics.outputs import find_prediction, float_tensors, replace_tensors
from kfc_fx.statistics.running import collected, gate, input_part
from kfc_fx.statistics.share import WHOLE, Part
from kfc_fx.statistics.sums import Fisher, ForwardRecord, Statistics, add
from kfc_fx.statistics.tap import OutputTap

Samples = int | Literal["auto"] | None

SHARES: dict[Fisher, tuple[float, int]] = {"sampled": (0.5, 128), "empirical": (0.25, 32)}
"""Of a batch, what statistics are estimated from with "auto", and the least number of examples.
Sampled targets are noise of their own, and their backward pass costs more than what a smaller
part would spare."""

ROWS = 8
"""Where Γ is of the loss's own cotangents, Ω is estimated from no more rows than so many times its
side, with "auto". With 4, of Γ too, the ViT of the race ended 1.5 % higher, with 2 it and ResNet-20
2 %."""

LEAST_EXAMPLES, LEAST_SHARE = 8, 1 / 16
"""But from so many examples, since rows of one are much alike, and from so much of the batch: large
ones are to have good statistics, and their steps cost so much that these do not show."""


class StatisticsRecorder:
    """Per-model state of statistics collection.

    ``armed`` is set by the optimizer when statistics are due. A forward pass then runs the
    emitting graphs, and the first backward pass through its output takes their statistics, or
    runs the Fisher pass for them.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.armed = False
        self.fisher: Fisher = "sampled"
        self.scale_free = False
        """Whether only the directions of Γ count."""
        self.seed: int | None = None
        self.owner: object = None
        """Token of the optimizer that the statistics are for: the last one made."""
        self.seconds = 0.0
        """Time spent on Fisher passes, and on statistics in backward passes of the loss, so far."""
        self.samples: Samples = None
        """Examples of a forward pass that statistics are estimated from; None for all."""
        self.missing = ""
        """Why the last armed forward pass gave no statistics; empty where it is not known."""
        self.keep_inputs = False
        self.last_inputs: Inputs | None = None
        self.statistics = Statistics()
        self.open_passes: list[GradientPass] = []
        self.passes = 0
        """Armed forward passes so far."""
        self._records: list[ForwardRecord] = []
        self._probes: dict[str, dict[str, Tensor]] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def recording(self) -> ForwardRecord | None:
        """The record of the armed forward pass that is running, or None."""
        return self._records[-1] if self._records else None

    @contextmanager
    def forward_pass(self, examples: int, fisher: Fisher | None = None) -> Iterator[ForwardRecord]:
        """Run an armed forward pass of a batch: graphs emit while it lasts.

        Args:
            fisher: what its Γ is taken from, if not what the recorder's is.
        """
        self.passes += 1
        record = ForwardRecord(fisher or self.fisher)
        record.part = self.part(examples, record.fisher)
        with self.continued(record):
            yield record

    @contextmanager
    def continued(self, record: ForwardRecord) -> Iterator[None]:
        """While it lasts, graphs that run emit for a record: those of its forward pass, and of its
        backward pass where a checkpoint is reentrant. Backward passes may end in any order."""
        self._records.append(record)
        try:
            with input_part(record.part):
                yield
        finally:
            self._records.remove(record)

    def part(self, examples: int, fisher: Fisher) -> Part:
        """The part of a batch that statistics are estimated from."""
        if self.samples is None or not examples:
            return WHOLE
        if self.samples != "auto":
            return Part(min(1.0, self.samples / examples))
        share, least = SHARES[fisher]
        own = min(1.0, max(least, share * examples) / examples)
        if fisher == "sampled":
            return Part(own)
        least = max(LEAST_EXAMPLES, round(LEAST_SHARE * examples))
        return Part(own, examples, ROWS, least)

    def probes_for(
        self, block: BlockSpec, forms: FactorForms, weight: Tensor, *, gated: bool
    ) -> tuple[Tensor, ...]:
        """Probes of a block for the running forward pass, on the weight's device."""
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        record, leaves = self.recording, []
        assert record is not None
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
        record.probes[block.name] = tuple(leaves)
        if record.fisher == "empirical":
            scaled, names = quadratic_statistic(block), statistic_shapes(block, forms)
            takes = [record.collect(block.name, n, quadratic=n == scaled) for n in names]
            return tuple(map(collected, leaves, takes))
        return tuple(gate(leaf) for leaf in leaves) if gated else tuple(leaves)

    def note_rows(
        self,
        blocks: Sequence[BlockSpec],
        spans: Sequence[tuple[int, int]],
        rows: Sequence[int],
    ) -> None:
        """Add the row counts that a graph of the running forward pass returned: for each of its
        sites the block, the groups ``[start, stop)`` of it, and N·|T|."""
        assert self.recording is not None
        for block, (start, stop), count in zip(blocks, spans, rows, strict=True):
            counts = self.recording.rows.setdefault(block.name, [0] * block.groups)
            for group in range(start, stop):
                counts[group] += count

    def note_inputs(self, block: BlockSpec, statistics: Mapping[str, Tensor]) -> None:
        """Add input statistics that a graph of the running forward pass returned for a site."""
        assert self.recording is not None
        add(self.recording.inputs, block.name, statistics)

    def collect(self, output: Any, record: ForwardRecord) -> None:
        """Run the Fisher pass at once, with sampled targets, without a loss's backward pass."""
        prediction = find_prediction(output)
        self.likelihood.examples(prediction)
        FisherPass(self, prediction, record)([])

    def tap(self, output: Any, record: ForwardRecord) -> Any:
        """Put the output tap on every differentiable tensor of the output.

        Raises:
            OutputError: the output holds no prediction.
        """
        if record.missing:
            self.missing = record.missing
            return output
        prediction = find_prediction(output)
        self.likelihood.examples(prediction)  # raises for an output without examples
        tensors = [t for t in float_tensors(output) if t.requires_grad]
        if not tensors or not (record.rows or record.again):
            return output  # nothing to differentiate: a frozen or unused part of the model
        run: FisherPass | GradientPass
        position = _position(prediction, tensors)
        if record.fisher == "empirical":
            run = GradientPass(self, prediction, position, record)
        else:
            run = FisherPass(self, prediction, record)
        tapped = OutputTap.apply(run, *tensors)
        by_id = {id(old): new for old, new in zip(tensors, tapped, strict=True)}
        return replace_tensors(output, lambda t: by_id.get(id(t), t))

    def take(self) -> Statistics:
        """The sums so far; the recorder starts anew, and takes no more of a pass that runs."""
        self.missing = ""
        for running in list(self.open_passes):
            running.close()
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


def _position(prediction: Tensor, tensors: Sequence[Tensor]) -> int:
    for position, tensor in enumerate(tensors):
        if tensor is prediction:
            return position
    raise OutputError(
        "the prediction in the model's output does not depend on any trained parameter, "
        "so it has no curvature; check that it is not detached"
    )
