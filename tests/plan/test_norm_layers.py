"""Scale and shift of norm layers: per channel the exact Fisher matrix, by a loop over examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.linalg.eigenbasis import eigendecomposition
from tests.models import first_factors, losses
from tests.options import kfc
from tests.oracle import categorical_cotangent


class WrittenOut(nn.Module):
    """An RMS norm as many models write it: the weight times a normalised input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())


LAYERS = {
    "layer norm": (lambda: nn.LayerNorm(4), (6, 3, 4)),
    "layer norm of two axes": (lambda: nn.LayerNorm((3, 4)), (6, 2, 3, 4)),
    "layer norm of rows": (lambda: nn.LayerNorm(4), (6, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (6, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (6, 4, 3, 2)),
    "rms norm": (lambda: nn.RMSNorm(4), (6, 3, 4)),
    "written out": (lambda: WrittenOut(4), (6, 3, 4)),
    "batch norm in evaluation mode": (lambda: nn.BatchNorm2d(4).eval(), (6, 4, 3, 2)),
}


def network(layer: nn.Module, width: int) -> nn.Sequential:
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 5)).double()
    for parameter in layer.parameters():  # weights of one and biases of zero would hide errors
        parameter.data.uniform_(0.5, 1.5)
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    return net


def exact_fisher(net, parameters, x, y):
    """``Σ_n u_n u_nᵀ / N`` of each element of ``parameters``, u_n one example's gradients."""
    cotangent = categorical_cotangent(y)
    total = 0
    for n in range(len(x)):
        output = net(x[n : n + 1])
        gradients = torch.autograd.grad(output, parameters, cotangent(output, n))
        u = torch.stack([g.flatten() for g in gradients], 1)
        total = total + u[:, :, None] * u[:, None, :]
    return total / len(x)


@pytest.mark.parametrize("name", LAYERS)
def test_the_factor_is_the_exact_fisher_matrix(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build()
    x, y = torch.randn(shape).double(), torch.randint(5, (shape[0],))
    net = network(layer, x[0].numel())
    if isinstance(layer, nn.BatchNorm2d):
        net.eval()
    compiled, factors = first_factors(net, x, y)
    assert compiled.kfc.plan.block("0").kind == "scale_shift"
    assert not compiled.kfc.plan.generic
    expected = exact_fisher(net, list(layer.parameters()), x, y)
    found = factors["0"].omega
    torch.testing.assert_close(found.reshape(expected.shape), expected)
    torch.testing.assert_close(factors["0"].gamma.flatten(), torch.ones(len(expected)).double())


def test_batch_norm_in_training_mode():
    """Its examples are coupled: u_n sums the batch's cotangent over one example's locations."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(4)
    x, y = torch.randn(6, 4, 3, 2).double(), torch.randint(5, (6,))
    net = network(layer, 24)
    _, factors = first_factors(net, x, y)
    normalised = F.batch_norm(x, None, None, training=True)
    hidden = layer.weight[:, None, None] * normalised + layer.bias[:, None, None]
    hidden = hidden.detach().requires_grad_()
    output = net[1:](hidden)
    onehot = F.one_hot(y, 5).double()
    (g,) = torch.autograd.grad(output, hidden, output.detach().softmax(-1) - onehot)
    u = torch.stack([(g * normalised).sum((2, 3)), g.sum((2, 3))], 2)
    torch.testing.assert_close(
        factors["0"].omega, torch.einsum("ncij->cij", u[..., None] * u[:, :, None]) / 6
    )


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_they_train(scaling):
    torch.manual_seed(0)
    net = network(nn.LayerNorm(4), 12)
    net.requires_grad_(False)
    net[0].requires_grad_(True)
    x, y = torch.randn(6, 3, 4).double(), torch.randint(5, (6,))
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, lr=0.05, scaling=scaling, clip=None, every=2)
    seen = losses(compiled, opt, x, y, 30)
    assert seen[-1] < seen[0] - 0.1


def test_without_blocks_on_request():
    compiled = kfc_fx.compile(network(nn.LayerNorm(4), 12), norm_layers=False, strict=True)
    plan = compiled.kfc.trace(torch.randn(2, 3, 4).double())
    assert [block.name for block in plan.blocks] == ["3"]
    reasons = {g.name: g.reason for g in plan.generic}
    assert reasons == {
        "0.weight": "scale of a norm layer, and norm_layers=False",
        "0.bias": "bias of a layer without a block for it (0.weight)",
    }


def test_a_layer_of_constants_is_generic():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(3, 4)
            self.head = nn.Linear(4, 5)
            self.register_buffer("order", torch.arange(3))

        def forward(self, x):
            first = self.positions(self.order)
            return self.head(x + first + self.positions(torch.arange(x.shape[1]))).mean(1)

    compiled = kfc_fx.compile(Positions())
    plan = compiled.kfc.trace(torch.randn(2, 3, 4))
    (generic,) = plan.generic
    assert generic.name == "positions.weight"
    assert "its input does not depend on the examples" in generic.reason


def test_two_by_two_in_closed_form():
    torch.manual_seed(0)
    root = torch.randn(50, 2, 2).double()
    factor = root @ root.mT
    factor[0] = torch.eye(2)
    factor[1] = 0
    factor[2] = torch.diag(torch.tensor([3.0, 1.0]))
    factor[3] = torch.nan
    values, basis, failed = eigendecomposition(factor)
    assert failed.nonzero().flatten().tolist() == [3]
    torch.testing.assert_close(basis[3], torch.eye(2).double())
    fine = [i for i in range(50) if i != 3]
    values, basis, factor = values[fine], basis[fine], factor[fine]
    torch.testing.assert_close(basis @ torch.diag_embed(values) @ basis.mT, factor)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2).double().expand(49, 2, 2))
    assert (values[:, 0] <= values[:, 1]).all()
