"""
Laplace approximation
=====================

A trained network is too sure of images that it has never seen the like of. The factors of its last
layer are the curvature of a posterior, and a prediction that takes the posterior into account is
less sure of them.
"""

# %%
# A trained network
# -----------------
# The last layer has a Gaussian prior of precision τ, so that training ends where the posterior has
# its mode.

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
x, y = images[:1200], labels[:1200]

net = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
)
kfc_fx.compile(net, likelihood="categorical")
opt = kfc_fx.KFC(net)
tau = 20.0
for _ in range(8):
    for batch in torch.randperm(len(x)).split(100):
        prior = tau / 2 * sum(p.square().sum() for p in net[6].parameters())
        loss = F.cross_entropy(net(x[batch]), y[batch]) + prior / len(x)
        loss.backward()
        opt.step()
        opt.zero_grad()

# %%
# Factors at the end of training
# ------------------------------
# A second optimizer takes no step: it sums factors over the training set, with all examples, and
# with sampled targets, so that they are of the Fisher matrix. With N examples, the curvature of the
# loss summed over them is ``N Ω ⊗ Γ``: Ω and Γ are means over examples, and a linear layer without
# shared locations has ``|T| = 1``.

statistics = kfc_fx.Statistics(fisher="sampled", samples=None)
curvature = kfc_fx.KFC(net, scaling="inverse", statistics=statistics, seed=0)
curvature.initialize(x.split(100))
factors = curvature.factors["6"]
print(factors.omega.shape, factors.gamma.shape)

# %%
# The posterior of the last layer
# -------------------------------
# A Gaussian prior of precision τ adds ``τ I``. In the eigenbases ``Ω = Q_Ω diag(λ) Q_Ωᵀ`` and ``Γ =
# Q_Γ diag(μ) Q_Γᵀ`` the posterior precision is diagonal, ``N λ_i μ_j + τ``. The scores are linear
# in the last layer, so that for a feature vector a (with a one for the bias) their covariance is
# ``Q_Γ diag_j(Σ_i (Q_Ωᵀ a)_i² / (N λ_i μ_j + τ)) Q_Γᵀ``.

omega_values, omega_basis = torch.linalg.eigh(factors.omega)
gamma_values, gamma_basis = torch.linalg.eigh(factors.gamma)
precision = len(x) * omega_values.clamp(min=0)[:, None] * gamma_values.clamp(min=0)


def predict(images: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[N, 10]`` of the network, and of the posterior by MacKay's approximation."""
    with torch.no_grad():
        features = net[:6](images)
        scores = net[6](features)
    a = F.pad(features, (0, 1), value=1.0) @ omega_basis  # [N, 65]
    spread = a.square() @ (1 / (precision + tau))  # [N, 10], in the basis of Γ
    variance = spread @ gamma_basis.square().T  # [N, 10], of each score
    return scores.softmax(1), (scores / (1 + math.pi / 8 * variance).sqrt()).softmax(1)


# %%
# Known and unknown images
# ------------------------
# Digits of the test set; the same ones turned by a quarter; negatives of them; and their pixels out
# of order. "Told apart" is the share of pairs, a digit and an unknown image, of which the digit has
# the greater confidence.

test, test_labels = images[1200:], labels[1200:]
shuffled = torch.randperm(64)
kinds = {
    "digits": test,
    "turned": test.rot90(1, (2, 3)),
    "negative": 1 - test,
    "out of order": test.flatten(1)[:, shuffled].reshape(test.shape),
}
confidences = {
    name: [chances.amax(1) for chances in predict(shown)] for name, shown in kinds.items()
}


def told_apart(known: Tensor, unknown: Tensor) -> float:
    return (known[:, None] > unknown).float().mean().item()


print("mean confidence, told apart: by the network, with the posterior")
for name, unknown in confidences.items():
    parts = [
        f"{own.mean():.2f}, {told_apart(known, own):.2f}"
        for known, own in zip(confidences["digits"], unknown, strict=True)
    ]
    print(f"{name:>12}: {'; '.join(parts)}")

for name, chances in zip(("network", "posterior"), predict(test), strict=True):
    right = (chances.argmax(1) == test_labels).float().mean()
    loss = F.nll_loss(chances.log(), test_labels)
    print(f"{name}: {100 * right:.1f} % right, negative log-likelihood {loss:.3f}")

# %%
# How sure they are
# -----------------
# The posterior takes confidence from all images, and most of it from those that are unlike the
# training set. The price is the likelihood of known digits, of which it is less sure than it might
# be.

figure, axes = plt.subplots(1, 4, figsize=(8, 2.4), sharey=True, layout="constrained")
for own, (name, pair) in zip(axes, confidences.items(), strict=True):
    own.hist([p.numpy() for p in pair], bins=10, range=(0, 1), label=("network", "posterior"))
    own.set(title=name, xlabel="confidence")
axes[0].legend()
