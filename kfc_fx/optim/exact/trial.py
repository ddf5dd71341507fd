"""Damping that follows how well the quadratic model predicts the loss (Levenberg-Marquardt)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DECAY = 19 / 20
"""ω₁ a step (Martens & Grosse 2015, section 6.5)."""
GOOD_RATIO, POOR_RATIO = 3 / 4, 1 / 4
LEAST, MOST = 1e-8, 1e4
"""Further out λ would change no step, and take as many adaptations to come back: near a minimum
neither the loss nor its model changes, and their ratio says nothing."""


def adapted_damping(damping: float, ratio: float, interval: int) -> float:
    """λ after ``interval`` steps: smaller where the loss fell by more than three quarters of what
    the model predicted, larger where by less than a quarter, or where it is not a number."""
    factor = DECAY**interval
    if ratio > GOOD_RATIO:
        return max(damping * factor, min(damping, LEAST))
    return damping if ratio >= POOR_RATIO else min(damping / factor, max(damping, MOST))


class Trial:
    """The place before a step, from which the loss of the same batch can be taken again.

    It holds copies of parameters and buffers, and the state of the random number generators, so
    that dropout and batch norm do as they did.
    """

    def __init__(self, model: nn.Module) -> None:
        """To be made before the forward pass of the step."""
        self._model = model
        self.parameters: dict[str, Tensor] = {
            n: p.detach().clone() for n, p in model.named_parameters()
        }
        self._buffers = [buffer.clone() for buffer in model.buffers()]
        self._generators = _generator_states(model)

    def change(self) -> dict[str, Tensor]:
        """How far the parameters have moved since."""
        return {
            name: p.detach() - self.parameters[name] for name, p in self._model.named_parameters()
        }

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Let a forward pass begin with the buffers and generators of then; those of now stay."""
        buffers = [buffer.clone() for buffer in self._model.buffers()]
        generators = _generator_states(self._model)
        try:
            self._set(self._buffers, self._generators)
            yield
        finally:
            self._set(buffers, generators)

    def _set(self, buffers: list[Tensor], generators: dict[torch.device, Tensor]) -> None:
        with torch.no_grad():
            for own, kept in zip(self._model.buffers(), buffers, strict=True):
                own.copy_(kept)
        for device, state in generators.items():
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)


def _generator_states(model: nn.Module) -> dict[torch.device, Tensor]:
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        states[device] = torch.cuda.get_rng_state(device)
    return states
