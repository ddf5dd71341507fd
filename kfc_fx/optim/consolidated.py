"""State of other ranks, brought here for somebody who saves it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.sharded_state import ShardedState
from kfc_fx.engine.state import SavedState


class Consolidated:
    """What was brought of one model, until its state changes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._blocks: dict[str, dict[str, Tensor]] = {}
        """Of all ranks, on a CPU."""
        self._whole: SavedState | None = None
        """This rank's state with what is shaped like parameters whole."""

    @property
    def is_whole(self) -> bool:
        """Whether this rank has everything."""
        return self._whole is not None

    def forget(self) -> None:
        """Have this rank's part alone again."""
        self._blocks, self._whole = {}, None

    def gather_blocks(self, held: SavedState) -> None:
        """Bring the state of all ranks' blocks to all ranks, which ask together.

        Args:
            held: of this rank, without what was brought.
        """
        self._blocks = _joined(self._ranks.gather_objects(_on_cpu(held.blocks)))

    def bring_to(self, rank: int, held: SavedState, parameters: Mapping[str, Tensor]) -> None:
        """Bring the state of all ranks' blocks, and what is divided of parameters, to one rank. All
        ask together.

        Args:
            held: as for :meth:`gather_blocks`.
            parameters: of the model by name.
        """
        everywhere = self._ranks.gather_objects_on(rank, _on_cpu(held.blocks))
        whole = ShardedState(parameters).whole_state(held)
        if self._ranks.rank == rank:
            self._blocks, self._whole = _joined(everywhere), whole

    def over(self, held: SavedState) -> SavedState:
        """A state of this rank with what was brought."""
        state = self._whole or held
        return replace(
            state,
            blocks=ChainMap(cast(Any, state.blocks), self._blocks),
            elsewhere={n: own for n, own in state.elsewhere.items() if n not in self._blocks},
        )


def _joined(everywhere: Any) -> dict[str, dict[str, Tensor]]:
    return {name: own for blocks in everywhere for name, own in blocks.items()}


def _on_cpu(blocks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        block: {name: value.detach().cpu().clone() for name, value in blocks[block].items()}
        for block in blocks
    }
