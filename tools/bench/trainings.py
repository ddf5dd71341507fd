"""Large models of known libraries, freshly initialized, with random data for a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_CLASSES = 1000
IMAGE_SIDE = 224
TOKENS = 128


@dataclass(frozen=True)
class Training:
    """A freshly initialized model, its input, and the loss of a call of it."""

    model: nn.Module
    x: Tensor
    loss: Callable[[Any], Tensor]


def images(model: nn.Module, batch: int, channels: int, side: int, classes: int) -> Training:
    """Classification of random images."""
    y = torch.randint(classes, (batch,))
    x = torch.randn(batch, channels, side, side)
    return Training(model, x, lambda output: F.cross_entropy(output, y))


def torchvision(name: str, batch: int = 8) -> Training:
    """A model of torchvision on images of 224 pixels."""
    from torchvision import models

    return images(getattr(models, name)(), batch, 3, IMAGE_SIDE, IMAGE_CLASSES)


def gpt2(layers: int = 12, *, tied: bool = True, batch: int = 4) -> Training:
    """GPT-2, 768 wide with 50,257 words, without dropout; it predicts the next of 128 words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off: dict[str, Any] = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, tie_word_embeddings=tied, **off))
    words = torch.randint(model.config.vocab_size, (batch, TOKENS + 1))
    y = words[:, 1:].flatten()
    return Training(
        model, words[:, :-1], lambda output: F.cross_entropy(output.logits.flatten(0, 1), y)
    )
