"""Models for which KFC is exact, and the invariance of the paper's theorem 3."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.options import kfc


def test_one_linear_layer_with_gaussian_likelihood_takes_the_natural_gradient_step():
    """The Fisher matrix of a linear regression is ``E[a aᵀ] ⊗ I``: one step solves it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    x, target = torch.randn(50, 4).double(), torch.randn(50, 3).double()
    noise = torch.linalg.qr(torch.randn(50, 50).double()).Q[:, :3] * 50**0.5
    compiled = kfc_fx.compile(net, likelihood=lambda z: noise)  # Γ = noiseᵀ noise / N = I
    opt = kfc(compiled, lr=1.0, scaling="inverse", damping=0.0, clip=None, momentum=0.0)
    (0.5 * (compiled(x) - target).square().sum() / 50).backward()
    opt.step()
    torch.testing.assert_close(opt.factors["0"].gamma, torch.eye(3).double())
    ones = torch.cat([x, torch.ones(50, 1).double()], 1)
    solution = torch.linalg.lstsq(ones, target).solution.T
    torch.testing.assert_close(net[0].weight.detach(), solution[:, :4])
    torch.testing.assert_close(net[0].bias.detach(), solution[:, 4])


def test_gaussian_likelihood_samples_give_that_step_on_average():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    x, target = torch.randn(20000, 4).double(), torch.randn(20000, 3).double()
    compiled = kfc_fx.compile(net, likelihood="gaussian")
    opt = kfc(compiled, lr=1.0, scaling="inverse", damping=0.0, clip=None, momentum=0.0)
    (0.5 * (compiled(x) - target).square().sum() / len(x)).backward()
    opt.step()
    ones = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    solution = torch.linalg.lstsq(ones, target).solution.T
    assert (net[0].weight - solution[:, :4]).abs().max() < 0.02


class Mapped(nn.Module):
    """Two convolutions with an invertible affine channel map after the activation, folded in.

    With ``undo`` the second convolution's weights make up for the map, so that the function of
    the input is the same as without it.
    """

    def __init__(self, base: nn.Sequential, matrix: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        self.matrix, self.shift = matrix, shift
        self.first = nn.Conv2d(2, 3, 3).double()
        self.second = nn.Conv2d(3, 4, 3).double()
        self.first.load_state_dict(base[0].state_dict())
        inverse = torch.linalg.inv(matrix)
        weight = torch.einsum("oikl,ij->ojkl", base[2].weight.detach(), inverse)
        with torch.no_grad():
            self.second.weight.copy_(weight)
            self.second.bias.copy_(base[2].bias - torch.einsum("oikl,i->o", weight, shift))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        mapped = torch.einsum("ij,njhw->nihw", self.matrix, hidden)
        return self.second(mapped + self.shift[:, None, None]).flatten(2).mean(2)


class PreMapped(Mapped):
    """The map acts on the pre-activations: the first layer makes up for its inverse."""

    def __init__(self, base: nn.Sequential, matrix: torch.Tensor, shift: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.matrix, self.shift = matrix, shift
        self.first = nn.Conv2d(2, 3, 3).double()
        self.second = nn.Conv2d(3, 4, 3).double()
        self.second.load_state_dict(base[2].state_dict())
        inverse = torch.linalg.inv(matrix)
        with torch.no_grad():
            self.first.weight.copy_(torch.einsum("ij,jckl->ickl", inverse, base[0].weight))
            self.first.bias.copy_(inverse @ (base[0].bias - shift))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mapped = torch.einsum("ij,njhw->nihw", self.matrix, self.first(x))
        return self.second(torch.tanh(mapped + self.shift[:, None, None])).flatten(2).mean(2)


def outputs_after_a_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    compiled = kfc_fx.compile(net, likelihood="gaussian")  # softmax scores have a singular Γ
    opt = kfc(compiled, lr=0.3, scaling="inverse", damping=0.0, clip=None, momentum=0.0, seed=5)
    F.mse_loss(compiled(x), y).backward()
    before = compiled(x).detach()
    opt.step()
    after = compiled(x).detach()
    assert (after - before).abs().max() > 1e-3
    return after


@pytest.mark.parametrize("place", [Mapped, PreMapped])
def test_an_affine_channel_map_leaves_an_undamped_step_unchanged(place):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3)).double()
    x, y = torch.randn(64, 2, 7, 7).double(), torch.randn(64, 4).double()
    identity = place(base, torch.eye(3).double(), torch.zeros(3).double())
    matrix = torch.randn(3, 3).double() + 2 * torch.eye(3).double()
    mapped = place(base, matrix, torch.randn(3).double())
    torch.testing.assert_close(identity(x), mapped(x))
    torch.testing.assert_close(
        outputs_after_a_step(identity, x, y), outputs_after_a_step(mapped, x, y)
    )
