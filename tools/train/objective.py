"""What a network of ``kfc-fx train`` is trained for, and what it is tested by."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfc_fx.tools.data.sets import ImageSet

Test = Literal["accuracy", "loss"]
"""What a network is tested by."""
EVALUATION_BATCH = 512
LARGEST_PIXEL = 255


class Objective(Protocol):
    """A loss over rows of an image set."""

    test: Test
    """What the figure of the test set is."""
    likelihood: Literal["categorical", "bernoulli"]
    """Of the network's output."""

    def inputs(self, images: Tensor) -> Tensor:
        """What the network gets for uint8 images ``[N, C, H, W]``."""

    def loss(self, network: nn.Module, examples: ImageSet, rows: Tensor) -> Tensor:
        """Of the examples at ``rows``."""

    def figure(self, network: nn.Module, examples: ImageSet) -> float:
        """That of the test set, of a network in evaluation mode."""


class Classification:
    """Cross-entropy of labels; images are of zero mean and unit variance by channel.

    Args:
        train: what mean and variance are of.
    """

    test: Test = "accuracy"
    likelihood: Literal["categorical", "bernoulli"] = "categorical"

    def __init__(self, train: ImageSet) -> None:
        mean, scale = channel_statistics(train.images)
        self._mean, self._scale = mean.to(train.images.device), scale.to(train.images.device)

    def inputs(self, images: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return (images.float() - self._mean) * self._scale

    def loss(self, network: nn.Module, examples: ImageSet, rows: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return F.cross_entropy(network(self.inputs(examples.images[rows])), examples.labels[rows])

    def figure(self, network: nn.Module, examples: ImageSet) -> float:
        """Accuracy."""
        correct = 0
        pairs = zip(
            examples.images.split(EVALUATION_BATCH),
            examples.labels.split(EVALUATION_BATCH),
            strict=True,
        )
        for images, labels in pairs:
            correct += int((network(self.inputs(images)).argmax(1) == labels).sum())
        return correct / len(examples)


class Reconstruction:
    """Binary cross-entropy of the pixels of an image, which is its own target; the network returns
    logits ``[N, C · H · W]`` for pixels in 0 to 1."""

    test: Test = "loss"
    likelihood: Literal["categorical", "bernoulli"] = "bernoulli"

    def inputs(self, images: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return images.float() / LARGEST_PIXEL

    def loss(self, network: nn.Module, examples: ImageSet, rows: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return self._sum(network, examples.images[rows]) / len(rows)

    def figure(self, network: nn.Module, examples: ImageSet) -> float:
        """Mean loss of an image."""
        parts = examples.images.split(EVALUATION_BATCH)
        total = torch.stack([self._sum(network, images) for images in parts]).sum()
        return float(total) / len(examples)

    def _sum(self, network: nn.Module, images: Tensor) -> Tensor:
        pixels = self.inputs(images)
        return F.binary_cross_entropy_with_logits(
            network(pixels).flatten(1), pixels.flatten(1), reduction="sum"
        )


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation ``[C, 1, 1]`` of uint8 images ``[N, C, H, W]``."""
    # A histogram is exact, and takes no float copy of the whole set.
    counts = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    ).double()
    levels = torch.arange(256, dtype=torch.float64)
    probability = counts / counts.sum(1, keepdim=True)
    mean = probability @ levels
    deviation = (probability @ levels**2 - mean**2).clamp(min=0).sqrt()
    scale = 1 / deviation.clamp(min=1.0)
    return mean.float()[:, None, None], scale.float()[:, None, None]
