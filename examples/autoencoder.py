"""
Autoencoder
===========

A deep autoencoder of the digits. Such networks are badly conditioned, which is what natural
gradient is for.
"""

# %%
# Network and loss
# ----------------
# The pixels are independent Bernoulli variables. KFC finds that from the loss.

import itertools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import kfc_fx

images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
sizes = (64, 128, 64, 32, 8, 32, 64, 128, 64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def fit(net: nn.Module, opt: torch.optim.Optimizer, steps: int = 150) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min(1, (step + 1) / 10, 2 * (1 - step / steps))
    )
    losses = []
    for _ in range(steps):
        x = images[torch.randint(len(images), (256,), generator=generator)]
        loss = F.binary_cross_entropy_with_logits(net(x), x, reduction="sum") / len(x)
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


# %%
# Training
# --------

net = kfc_fx.compile(network())
by_kfc = fit(net, kfc_fx.KFC(net))
print(net.kfc.likelihood)

plain = network()
by_adamw = fit(plain, torch.optim.AdamW(plain.parameters(), lr=3e-3))

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(by_kfc, label="KFC")
axes.plot(by_adamw, label="AdamW")
axes.set(xlabel="step", ylabel="cross-entropy of an image", yscale="log")
axes.legend()

# %%
# Reconstructions
# ---------------
# Images, and below them what comes back from eight numbers: by KFC, then by AdamW.

with torch.no_grad():
    rows = [images[:10], net(images[:10]).sigmoid(), plain(images[:10]).sigmoid()]
figure, axes = plt.subplots(3, 10, figsize=(6, 2), layout="constrained")
for row, shown in zip(axes, rows, strict=True):
    for own, image in zip(row, shown, strict=True):
        own.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        own.axis("off")
