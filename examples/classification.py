"""
Image classification
====================

A small convolutional network learns scikit-learn's digits, once by KFC and once by SGD.
"""

# %%
# Data and network
# ----------------
# 1797 images of 8x8 pixels. Each run starts from the same parameters.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import kfc_fx

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train, test = slice(0, 1500), slice(1500, None)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


# %%
# One loop for both
# -----------------
# KFC is a ``torch.optim.Optimizer``, so the loop does not know which one it has.


def fit(net: nn.Module, opt: torch.optim.Optimizer, steps: int = 60) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min(1, (step + 1) / 10, 2 * (1 - step / steps))
    )
    losses = []
    for _ in range(steps):
        batch = torch.randint(1500, (128,), generator=generator)
        loss = F.cross_entropy(net(images[train][batch]), labels[train][batch])
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        right = (net(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"{type(opt).__name__}: {100 * right:.1f} % of the test images are right")
    return losses


net = kfc_fx.compile(network())
opt = kfc_fx.KFC(net)
by_kfc = fit(net, opt)

plain = network()
by_sgd = fit(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True))

# %%
# The loss of both
# ----------------

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(by_kfc, label="KFC")
axes.plot(by_sgd, label="SGD")
axes.set(xlabel="step", ylabel="training loss", yscale="log")
axes.legend()

# %%
# What the compiler knows
# -----------------------
# Every layer has a block. The factors of the second convolution show what its inputs have in
# common.

print(net.kfc.plan)

# %%

factors = opt.factors["2"]
figure, axes = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
for own, title, matrix in zip(axes, ("Ω", "Γ"), (factors.omega, factors.gamma), strict=True):
    scale = matrix.diagonal().clamp(min=1e-12).rsqrt()
    own.imshow(scale[:, None] * matrix * scale, vmin=-1, vmax=1, cmap="RdBu")
    own.set(title=f"{title}, as correlations", xticks=[], yticks=[])
