"""Copies in single precision of parameters in half precision.

A step is often smaller than the spacing of bfloat16 numbers around a weight, and would be lost in
rounding; the copy keeps what rounding drops (Micikevicius et al. 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class MasterWeights:
    """The copies by name; made at the first step that asks for them."""

    def __init__(self, parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._copies = {n: _wide(parameters[n], v) for n, v in saved.items() if n in parameters}
        self._versions: dict[str, int] = {}

    def take_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy these parameters from now on; another tensor under a name begins with a new copy."""
        for name in [n for n in self._copies if parameters.get(n) is not self._parameters[n]]:
            del self._copies[name]
            self._versions.pop(name, None)
        self._parameters = parameters

    def of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The copies of some parameters.

        A parameter that was written since, by loading a checkpoint for one, is what counts: its
        copy follows wherever it does not round to the parameter any more.
        """
        for name in names:
            parameter, copy = self._parameters[name], self._copies.get(name)
            if copy is None:
                self._copies[name] = _wide(parameter, parameter).clone()
            elif self._versions.get(name) != parameter._version:
                fits = copy.to(parameter.dtype) == parameter
                self._copies[name] = torch.where(fits, copy, _wide(parameter, parameter))
        return {name: self._copies[name] for name in names}

    def note_written(self) -> None:
        """Remember that parameters and copies fit together now."""
        self._versions = {name: self._parameters[name]._version for name in self._copies}

    def held(self) -> dict[str, Tensor]:
        """The copies that there are."""
        return dict(self._copies)


def _wide(parameter: Tensor, value: Tensor) -> Tensor:
    return value.detach().to(parameter.device, torch.float32)
