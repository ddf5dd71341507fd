"""Networks to look at: their line numbers stand in the golden files."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ConvNet(nn.Module):
    """Convolutions of one shape, a norm, a head; for images ``[N, 2, 6, 6]``."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(144, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = F.relu(self.third(self.second(x)), inplace=True)
        return self.head(x.flatten(1))


class GroupedNet(nn.Module):
    """A grouped convolution, a linear layer over locations, a parameter that no layer owns and
    a frozen one; for images ``[N, 4, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False)
        self.tokens = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.ones(2, 3))
        self.head = nn.Linear(6, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(self.grouped(x).flatten(2).transpose(1, 2)).relu()
        return self.head(tokens.mean(1)) * self.scale.sum()


class TokenNet(nn.Module):
    """An embedding, a norm over features, a wide convolution; for tokens ``[N, 16]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        return self.head(self.mix(x.transpose(1, 2)).transpose(1, 2)[:, -1])


class Broken(nn.Module):
    """Runs in two graphs: dynamo does not follow ``graph_break``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x.relu())


class Branching(nn.Module):
    """A Python branch on a value, which ``symbolic_trace`` cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1 and x.sum() > 1e30:
            return x
        return self.layer(x)


class Checkpointed(nn.Module):
    """A layer inside an activation checkpoint, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda h: self.inside(h).tanh(), x, use_reentrant=False)
        return self.head(hidden)


class Functional(nn.Module):
    """Nothing to precondition."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale.sum()).sin()


INPUTS = {ConvNet: "4x2x6x6", GroupedNet: "4x4x8x8", TokenNet: "4x16:int64"}
