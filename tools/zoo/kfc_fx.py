"""Models of the zoo that no library has: a small convolutional net on raw audio."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kfc_fx.tools.zoo.case import ModelCase, ZooEntry

SAMPLES = 2000


def entries() -> Iterator[ZooEntry]:
    """The zoo's own models."""
    yield ZooEntry("kfc_fx", "audio", "conv1d_audio", _audio_case)


class AudioNet(nn.Module):
    """Waveforms ``[N, 1, samples]`` to class scores: a strided bank of filters, then dilated
    depthwise-separable blocks with residuals, as keyword spotters have them."""

    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.bank = nn.Conv1d(1, channels, kernel_size=80, stride=16)
        self.norm = nn.BatchNorm1d(channels)
        self.depthwise = nn.ModuleList(
            nn.Conv1d(channels, channels, 3, padding="same", dilation=2**i, groups=channels)
            for i in range(3)
        )
        self.pointwise = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.head = nn.Linear(channels, classes)

    def forward(self, waveform: Tensor) -> Tensor:
        """Class scores ``[N, classes]``."""
        x = self.norm(self.bank(waveform)).relu()
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = x + pointwise(depthwise(x)).relu()
        return self.head(x.mean(dim=-1))


def _audio_case() -> ModelCase:
    return ModelCase(AudioNet(), (torch.randn(2, 1, SAMPLES),), size=f"{SAMPLES} samples")
