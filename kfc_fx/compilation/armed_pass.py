"""One armed call of a model: what its graphs emit, and for whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from kfc_fx.plan.forms import FactorForms
from kfc_fx.plan.spec import BlockSpec
from kfc_fx.rewrite.emitting import Emitters
from kfc_fx.rewrite.emitting_graph import Emitted
from kfc_fx.statistics.collector import Collector
from kfc_fx.statistics.record import ForwardRecord
from kfc_fx.statistics.share import WHOLE, BatchShare
from kfc_fx.statistics.sums import add

OwnerOf = Callable[[str], Collector | None]
"""Parameter name to the collector that its statistics are for."""

BY_OP = 32
"""How many times statistics are taken before graphs with them are compiled, by a backend that
compiles. That takes longer than the model's own graphs do, and a run starts as fast without."""


@dataclass(eq=False)
class ArmedPass:
    """The records of one forward pass, one for each collector that is armed."""

    records: Mapping[Collector, ForwardRecord]
    graphs: int = 0
    """Runs of captured graphs in it."""
    _owners: dict[str, ForwardRecord] = field(default_factory=dict)
    _chosen: tuple[int, Emitters] | None = None

    @property
    def is_early(self) -> bool:
        """Whether it is one of the first with statistics, which a run may be over after."""
        return all(collector.number < BY_OP for collector in self.records)

    @property
    def has_emitted(self) -> bool:
        """Whether some block has emitted in it."""
        return any(record.emitted for record in self.records.values())

    def emitters(self, blocks: tuple[BlockSpec, ...], owner_of: OwnerOf, revision: int) -> Emitters:
        """Blocks that emit in this pass, by the name of their weight.

        Args:
            blocks: of the plan as it is now.
            revision: of the plan; the choice is made once for each.
        """
        if self._chosen is None or self._chosen[0] != revision:
            found: dict[str, tuple[BlockSpec, FactorForms]] = {}
            for block in blocks:
                owner = owner_of(block.weight)
                if owner is None or owner not in self.records:
                    continue
                forms = owner.request.forms(block)
                if forms is not None:
                    found[block.weight] = (block, forms)
                    self._owners[block.name] = self.records[owner]
            self._chosen = (revision, found)
        return self._chosen[1]

    def probes_for(
        self, block: BlockSpec, forms: FactorForms, weight: Tensor
    ) -> tuple[Tensor, ...]:
        """Probes of a block for this pass, on the weight's device."""
        record = self.record_of(block.name)
        (collector,) = (own for own, of_it in self.records.items() if of_it is record)
        return collector.probes_for(record, block, forms, weight)

    def note_layers(self, flops: int) -> None:
        """Add the operations of the gradients of one example in the layers of a graph that runs."""
        for record in self.records.values():
            record.flops += flops

    def note(self, emitted: Emitted) -> None:
        """Keep what a run of an emitting graph gives besides its outputs."""
        for block, span, rows in zip(*emitted.rows, strict=True):
            self.record_of(block.name).note_rows(block, span, rows)
        for block, statistics in emitted.inputs:
            record = self.record_of(block.name)
            if record.wants(block.name):  # compiled code computes those of all
                add(record.inputs, block.name, statistics)

    def record_of(self, block: str) -> ForwardRecord:
        """The record that takes the statistics of a block."""
        return self._owners[block]

    def share_of(self, block: str, traced: bool = False) -> BatchShare | None:
        """The share of the batch that the statistics of a block are of; None where they are not
        wanted.

        Args:
            traced: whether code is traced that other passes run too, which may want them.
        """
        if block not in self._owners:
            return WHOLE
        record = self._owners[block]
        return record.share if traced or record.wants(block) else None

    def drop_changed(self, blocks: tuple[BlockSpec, ...]) -> None:
        """Drop the statistics of blocks that a later graph of the pass has made others.

        Args:
            blocks: of the plan as it is after the pass.
        """
        now = {block.name: replace(block, uses=0) for block in blocks}
        for record in self.records.values():
            for name, (block, _) in list(record.emitted.items()):
                if now.get(name) != replace(block, uses=0):
                    record.drop(name)
