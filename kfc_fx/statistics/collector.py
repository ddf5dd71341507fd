"""Statistics of one model for one optimizer: the model holds it, the optimizer owns it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.plan.forms import FactorForms, quadratic_statistic, statistic_shapes
from kfc_fx.plan.spec import BlockSpec
from kfc_fx.statistics.inputs import Inputs
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.choice import LikelihoodChoice
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.record import Destination, ForwardRecord, probe_for
from kfc_fx.statistics.request import Fisher, StatisticsRequest
from kfc_fx.statistics.setup import Closable, PassSetup, Taps
from kfc_fx.statistics.sums import BlockSums, Sums

SPREAD = 0x9E3779B97F4A7C15
"""Between the seeds of one step's sampled targets and the next one's: odd, with bits all over."""


OF_RANK = 0xC2B2AE3D27D4EB4F
"""The same between one rank and the next."""


class Collector:
    """Sums the statistics that a request asks for, from the forward passes that it is armed for.

    An armed forward pass runs graphs that emit, and the first backward pass through its output
    takes their statistics, or runs the Fisher pass for them.
    """

    def __init__(
        self, choice: LikelihoodChoice, request: StatisticsRequest, batch_dim: int = 0
    ) -> None:
        self.choice = choice
        self.request: StatisticsRequest = request
        self.trained: Callable[[], Collection[int]] = tuple
        """Identities of the parameters that the statistics are for, as whoever asked for them has
        them now."""
        self._batch_dim = batch_dim
        self._armed = False
        self._ran = False
        self.left_out: Collection[str] = ()
        """Blocks whose statistics the next forward pass does not take."""
        self._sums = Sums()
        self._seconds = 0.0
        self._missing = self._missing_alone = ""
        self._last_inputs: Inputs | None = None
        self._opened: list[Closable] = []
        self._taps = Taps()
        self._leaves: dict[tuple[str, str], Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._seed: int = torch.initial_seed() if request.seed is None else request.seed
        self._number = 0
        self._rank = 0

    # -- for the optimizer -------------------------------------------------------------------

    @property
    def likelihood(self) -> Likelihood | None:
        """That of the model's output; None until it is known."""
        return self.choice.likelihood

    @property
    def likelihood_line(self) -> str:
        """The likelihood, and what Γ is estimated from, for people."""
        if self.likelihood is None:
            return "found from the loss at the first step"
        return f"{self.likelihood}, {self.request.fisher_for(self.likelihood)}"

    @property
    def armed(self) -> bool:
        """Whether the next forward pass takes statistics."""
        return self._armed

    @property
    def number(self) -> int:
        """How many statistics there were before these."""
        return self._number

    def arm(self, due: bool = True, number: int = 0, left_out: Collection[str] = ()) -> None:
        """Let the next forward passes take statistics, or not.

        Args:
            left_out: names of blocks whose statistics are not wanted.
            number: how many statistics there were. Their sampled targets follow from the seed and
                this number alone, so that a run that goes on from a saved state has the same.
        """
        self._armed, self._number, self.left_out = due, number, left_out

    def join(self, rank: int, ranks: int) -> None:
        """Say which of several ranks this is: each draws other targets, and statistics are of the
        examples of all."""
        if (rank, ranks) != (self._rank, self.request.ranks):
            self._rank, self.request = rank, replace(self.request, ranks=ranks)
            self._generators.clear()

    @property
    def sums(self) -> Sums:
        """The sums so far."""
        return self._sums

    def take(self) -> Sums:
        """The sums so far. The collector starts anew, and takes no more of a pass that runs."""
        self._missing = self._missing_alone = ""
        self._ran = False
        for running in list(self._opened):
            running.close()
        self._generators.clear()
        self._taps.forget()
        taken, self._sums = self._sums, Sums()
        return taken

    @property
    def taking(self) -> bool:
        """Whether a backward pass of the loss is under way that statistics are taken in."""
        return bool(self._opened)

    @property
    def may_lack(self) -> bool:
        """Whether it is no lack that there are no statistics: armed passes have run, without the
        few blocks whose statistics are wanted."""
        return self._ran and bool(self.left_out) and not self.missing

    @property
    def missing(self) -> str:
        """Why the last armed forward pass gave no statistics; empty where that is not known."""
        return self._missing or ("" if self._sums.blocks else self._missing_alone)

    def take_missing(self) -> str:
        """The same, which is forgotten then."""
        reason = self.missing
        self._missing = self._missing_alone = ""
        return reason

    def take_seconds(self) -> float:
        """Seconds spent on statistics since this was last asked: on passes for sampled targets,
        and on statistics within the loss's own."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @property
    def last_inputs(self) -> Inputs | None:
        """Inputs of the last forward pass, where the request keeps them."""
        return self._last_inputs

    @property
    def seed(self) -> int:
        """Of the sampled targets."""
        return self._seed

    def draw_from(self, seed: int) -> None:
        """Draw sampled targets from another seed from now on."""
        self._seed = seed
        self._generators.clear()

    # -- for the compiled model --------------------------------------------------------------

    def note_inputs(self, inputs: Inputs) -> None:
        """Keep the inputs of a forward pass, where the request wants them."""
        if self.request.keep_inputs:
            self._last_inputs = inputs

    def begin(self, examples: int, fisher: Fisher | None = None) -> ForwardRecord:
        """The record of an armed forward pass of a batch.

        Args:
            fisher: what its Γ is taken from, if not what the request says.
        """
        self._ran = True
        likelihood = self.choice.likelihood
        expected = fisher or self.request.fisher_for(likelihood or Categorical())
        known = fisher or self.request.fisher or likelihood
        share = self.request.share(examples, expected)
        return ForwardRecord(expected if known else None, share, examples, left_out=self.left_out)

    def probes_for(
        self, record: ForwardRecord, block: BlockSpec, forms: FactorForms, weight: Tensor
    ) -> tuple[Tensor, ...]:
        """Probes of a block for a forward pass, on the weight's device."""
        shapes = statistic_shapes(block, forms)
        leaves = tuple(
            self._leaf(block.name, name, shape, weight) for name, shape in shapes.items()
        )
        wanted = record.wants(block.name)
        if wanted:
            record.probes[block.name] = leaves
        scaled = quadratic_statistic(block)
        return tuple(
            probe_for(leaf, Destination(record, block.name, name, name == scaled, wanted))
            for name, leaf in zip(shapes, leaves, strict=True)
        )

    def _leaf(self, block: str, statistic: str, shape: tuple[int, ...], weight: Tensor) -> Tensor:
        """A leaf of a statistic's shape that holds no memory; the same for every pass."""
        dtype = statistic_dtype(weight)
        wanted = (shape, weight.device, dtype)
        leaf = self._leaves.get((block, statistic))
        if leaf is None or (leaf.shape, leaf.device, leaf.dtype) != wanted:
            leaf = torch.zeros(1, dtype=dtype, device=weight.device).expand(shape)
            self._leaves[block, statistic] = leaf.requires_grad_()
        return leaf

    def setup(self, record: ForwardRecord) -> PassSetup:
        """What the backward pass for the statistics of a forward pass works with."""
        return PassSetup(
            record,
            self.choice,
            self.request,
            record.examples,
            self._batch_dim,
            self.generator,
            lambda: self._sums,
            self._add,
            self.note_missing,
            self._opened,
            self._taps,
        )

    def note_missing(self, reason: str, *, alone: bool = False) -> None:
        """Keep why an armed forward pass gives no statistics.

        Args:
            alone: it is no lack where other passes of the step give some.
        """
        if alone:
            self._missing_alone = reason
        else:
            self._missing = reason

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of sampled targets on a device, apart from torch's global one."""
        if device not in self._generators:
            seed = (self._seed + SPREAD * self._number + OF_RANK * self._rank) % 2**63
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]

    def _add(self, taken: BlockSums, record: ForwardRecord, examples: int, seconds: float) -> None:
        work = record.flops * (record.examples or examples)  # also where examples count elsewhere
        self._sums.add(taken, record.rows, examples, work)
        trained = set(self.trained())  # not what stands in for a sharded weight in a forward pass
        weights = {name: record.weights[name] for name in taken if name in record.weights}
        self._sums.follow(
            {name: weight for name, weight in weights.items() if id(weight) in trained}
        )
        self._seconds += seconds
