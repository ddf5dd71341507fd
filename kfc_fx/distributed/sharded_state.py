"""State that is shaped like parameters which are sharded: in parts, and as checkpoints have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from kfc_fx.distributed.shards import is_distributed, sharding_of
from kfc_fx.engine.state import SavedState

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, eq=False)
class ShardedState:
    """State that is shaped like parameters, as this rank has it and as checkpoints have it."""

    parameters: Mapping[str, Tensor]

    def local(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a value for a parameter, whole or in parts of its own."""
        parameter = self.parameters.get(name)
        if is_distributed(value):
            same = is_distributed(parameter) and value.placements == parameter.placements
            return value.to_local() if same else self.local(name, value.full_tensor())
        if is_distributed(parameter) and value.shape == parameter.shape:
            found = sharding_of(name, parameter, self._ranks_of(parameter))
            own = self._ranks_of(parameter).index(dist.get_rank())
            return value if found is None else found.chunk(value, own)
        return value

    def whole(self, name: str, value: Tensor) -> Tensor:
        """A value of this rank's part as a distributed tensor, where the parameter is one."""
        parameter = self.parameters.get(name)
        if not is_distributed(parameter) or is_distributed(value):
            return value
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def local_state(self, saved: SavedState) -> SavedState:
        """What a state has of parameters, in this rank's parts."""
        return _changed(saved, self.local)

    def whole_state(self, saved: SavedState) -> SavedState:
        """The same whole, on a CPU. All ranks ask together."""

        def full(name: str, value: Tensor) -> Tensor:
            whole = self.whole(name, value)
            return (whole.full_tensor() if is_distributed(whole) else whole).detach().cpu().clone()

        return _changed(saved, full)

    @staticmethod
    def _ranks_of(parameter: DTensor) -> tuple[int, ...]:
        return tuple(int(rank) for rank in parameter.device_mesh.mesh.flatten())


def _changed(saved: SavedState, change: Callable[[str, Tensor], Tensor]) -> SavedState:
    def of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: change(name, value) for name, value in values.items()}

    generic = {
        name: {key: change(name, value) for key, value in entry.items()}
        for name, entry in saved.generic.items()
    }
    average, master_weights = of(saved.average), of(saved.master_weights)
    return replace(saved, generic=generic, average=average, master_weights=master_weights)
