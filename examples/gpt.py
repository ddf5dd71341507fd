"""
GPT
===

A small transformer learns to continue text, character by character. The text is Python's own
documentation.
"""

# %%
# Text
# ----
# The texts behind ``help("for")`` and its like come with Python.

import math
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx

text = "\n".join(topics[name] for name in sorted(topics))
text = "".join(c for c in text if c.isascii())[:400_000]
characters = sorted(set(text))
number = {character: index for index, character in enumerate(characters)}
tokens = torch.tensor([number[character] for character in text])
CONTEXT = 64

# %%
# Network
# -------
# Attention and layers are written as anybody writes them.


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(characters), width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(characters))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position[: x.shape[1]])))


# %%
# Training
# --------


def fit(net: nn.Module, opt: torch.optim.Optimizer, steps: int = 80) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min(1, (step + 1) / 10, 2 * (1 - step / steps))
    )
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT - 1, (32, 1), generator=generator)
        windows = tokens[starts + torch.arange(CONTEXT + 1)]
        scores = net(windows[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
net = kfc_fx.compile(GPT())
by_kfc = fit(net, kfc_fx.KFC(net))

torch.manual_seed(0)
plain = GPT()
by_adamw = fit(plain, torch.optim.AdamW(plain.parameters(), lr=3e-3))

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(by_kfc, label="KFC")
axes.plot(by_adamw, label="AdamW")
axes.axhline(math.log(len(characters)), color="gray", linewidth=0.8)
axes.set(xlabel="step", ylabel="cross-entropy of a character")
axes.legend()

# %%
# Blocks
# ------
# Every layer has one, the norms too. The positions are a parameter without a layer: AdamW updates
# them.

print(net.kfc.plan)

# %%
# A continuation
# --------------

sample = tokens[:CONTEXT].unsqueeze(0)
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for _ in range(120):
        chances = net(sample[:, -CONTEXT:])[:, -1].softmax(-1)
        sample = torch.cat([sample, torch.multinomial(chances, 1, generator=generator)], dim=1)
print("".join(characters[index] for index in sample[0].tolist()))
