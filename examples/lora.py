"""
Fine-tuning with LoRA
=====================

A network that knows the digits 0 to 4 learns the digits 5 to 9 by adapters of low rank. The
adapters are blocks.
"""

# %%
# A base to start from
# --------------------
# It is trained on one half of the classes, and then frozen by PEFT.

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
low, high = labels < 5, labels >= 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh()), nn.Linear(128, 5)
    )


def fit(
    net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(x), (128,), generator=generator)
        loss = F.cross_entropy(net(x[batch]), y[batch])
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


base = network()
fit(base, torch.optim.AdamW(base.parameters(), lr=3e-3), images[low], labels[low], 60)
trained = {name: value.clone() for name, value in base.state_dict().items()}

# %%
# Adapters
# --------
# ``get_peft_model`` first, ``kfc_fx.compile`` after it. The base is frozen, and the plan says so.


def adapted() -> nn.Module:
    net = network()
    net.load_state_dict(trained)
    torch.manual_seed(1)
    return get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"]))


x, y = images[high][:600], labels[high][:600] - 5
model = kfc_fx.compile(adapted())
by_kfc = fit(model, kfc_fx.KFC(model), x, y, 80)
print(model.kfc.plan)

# %%
# Beside AdamW
# ------------

other = adapted()
trainable = [p for p in other.parameters() if p.requires_grad]
by_adamw = fit(other, torch.optim.AdamW(trainable, lr=3e-3), x, y, 80)

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(by_kfc, label="KFC")
axes.plot(by_adamw, label="AdamW")
axes.set(xlabel="step", ylabel="training loss", yscale="log")
axes.legend()

# %%
# Merge
# -----
# The adapters go into the base as ever. The merged network gives the same scores.

with torch.no_grad():
    before = model(images[high][600:])
    kfc_fx.uncompile(model)
    merged = model.merge_and_unload()
    after = merged(images[high][600:])
right = (after.argmax(1) == labels[high][600:] - 5).float().mean()
print(f"{100 * right:.1f} % of the test images are right")
print(f"largest difference by merging: {(after - before).abs().max():.1e}")
