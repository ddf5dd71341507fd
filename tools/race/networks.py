"""The networks of ``kfc-fx bench train`` beside those of :mod:`kfc_fx.tools.data.networks`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AUTOENCODER_WIDTHS = (784, 1000, 500, 250, 30)
RESNET_WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around an identity that pads new channels by zero
    (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + shortcut)


def resnet20(classes: int = 10) -> nn.Module:
    """ResNet-20 for CIFAR (He et al. 2016): three stages of three blocks, 16, 32, 64 channels."""
    stages = [
        BasicBlock(RESNET_WIDTHS[max(stage - 1, 0)] if block == 0 else width, width)
        for stage, width in enumerate(RESNET_WIDTHS)
        for block in range(3)
    ]
    return nn.Sequential(
        nn.Conv2d(3, RESNET_WIDTHS[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(RESNET_WIDTHS[0]),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(RESNET_WIDTHS[-1], classes),
    )


def autoencoder() -> nn.Module:
    """784-1000-500-250-30 and back, tanh, Xavier weights, a linear code (Hinton &
    Salakhutdinov 2006); ``[N, 784]`` in, logits ``[N, 784]`` out."""
    widths = (*AUTOENCODER_WIDTHS, *AUTOENCODER_WIDTHS[-2::-1])
    linear_outputs = (len(AUTOENCODER_WIDTHS) - 2, len(widths) - 2)  # the code, and the logits
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        layer = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer] if number in linear_outputs else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


class TransformerBlock(nn.Module):
    """Pre-norm attention and a GELU layer four times as wide."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]`` to the same."""
        x = x + self.projection(self._attention(self.qkv(self.norm1(x))))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))

    def _attention(self, qkv: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, 2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return attended.transpose(1, 2).flatten(2)


class VisionTransformer(nn.Module):
    """A small ViT (Dosovitskiy et al. 2021): patches of 8x8 of images of 32x32, mean pooling."""

    def __init__(self, classes: int = 10, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, causal=False) for _ in range(depth))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` to logits ``[N, classes]``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class CharacterGPT(nn.Module):
    """A causal transformer over characters, 2 blocks of width 128, untied head."""

    def __init__(
        self, symbols: int, context: int = 64, width: int = 128, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, causal=True) for _ in range(depth))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 ``[N, T]`` to logits ``[N, T, symbols]``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.blocks(hidden)))
