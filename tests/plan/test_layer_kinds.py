"""Layers beyond conv and linear: their factors against per-example sums, and how they train."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.plan import spec
from tests.models import first_factors, losses
from tests.options import kfc
from tests.oracle import categorical_cotangent, exact_factors

TRANSPOSED = [
    {"kernel_size": k, "stride": s, "padding": p, "dilation": d, "output_padding": o, "groups": g}
    for k, s, p, d, o, g in [
        (3, 1, 0, 1, 0, 1),
        (3, 2, 1, 1, 1, 1),
        (2, 2, 0, 1, 0, 2),
        (4, 2, 1, 1, 0, 1),
        (3, 1, 1, 2, 1, 1),
        (3, 2, 2, 3, 2, 2),
        (2, 3, 1, 1, 0, 1),
        ((3, 2), (2, 1), (1, 0), 1, (1, 0), 1),
    ]
]


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(width, 5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", TRANSPOSED, ids=lambda o: "-".join(f"{k[0]}{v}" for k, v in o.items())
)
def test_transposed_convolution(options, bias):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(2, 4, bias=bias, **options)
    width = layer(torch.zeros(1, 2, 4, 3)).numel()
    net = nn.Sequential(layer, *head(width)).double()
    x, y = torch.randn(5, 2, 4, 3).double(), torch.randint(5, (5,))
    compiled, factors = first_factors(net, x, y)
    block = compiled.kfc.plan.block("0")
    assert (block.kind, block.bias) == ("conv_transpose2d", None)
    omega, gamma = exact_factors(net, layer, x, categorical_cotangent(y))
    torch.testing.assert_close(factors["0"].omega.reshape(omega.shape), omega)
    torch.testing.assert_close(factors["0"].gamma.reshape(gamma.shape), gamma)
    if bias:
        (generic,) = compiled.kfc.plan.generic
        assert (generic.name, "conv_transpose2d" in generic.reason) == ("0.bias", True)


@pytest.mark.parametrize("ndim", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_in_other_dimensions(ndim, groups):
    torch.manual_seed(0)
    kind = {1: nn.ConvTranspose1d, 3: nn.ConvTranspose3d}[ndim]
    layer = kind(2, 2, 3, stride=2, padding=1, groups=groups, bias=False)
    shape = (5, 2, *(3,) * ndim)
    net = nn.Sequential(layer, *head(layer(torch.zeros(1, *shape[1:])).numel())).double()
    x, y = torch.randn(shape).double(), torch.randint(5, (5,))
    _, factors = first_factors(net, x, y)
    omega, gamma = exact_factors(net, layer, x, categorical_cotangent(y))
    torch.testing.assert_close(factors["0"].omega.reshape(omega.shape), omega)
    torch.testing.assert_close(factors["0"].gamma.reshape(gamma.shape), gamma)


class Functional(nn.Module):
    """A hidden layer applied by some function of ``(x, weight, bias)``."""

    def __init__(self, apply, weight_shape, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(weight_shape) / 2)
        self.bias = nn.Parameter(torch.randn(3)) if bias else None
        self.head = nn.Linear(3, 5)
        self.apply_layer = apply

    def forward(self, x):
        hidden = self.apply_layer(x, self.weight, self.bias)
        return self.head(hidden.tanh().flatten(1, -2).sum(1) if hidden.dim() > 2 else hidden.tanh())


PRODUCTS = {
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (4, 3), True),
    "addmm method": (lambda x, w, b: b.addmm(x, w), (4, 3), True),
    "matmul": (lambda x, w, _: torch.matmul(x, w), (4, 3), False),
    "at": (lambda x, w, _: x @ w, (4, 3), False),
    "matmul method": (lambda x, w, _: x.matmul(w), (4, 3), False),
    "mm": (lambda x, w, _: torch.mm(x, w), (4, 3), False),
    "mm method": (lambda x, w, _: x.mm(w), (4, 3), False),
    "at transposed": (lambda x, w, _: x @ w.t(), (3, 4), False),
    "at T": (lambda x, w, _: x @ w.T, (3, 4), False),
    "at mT": (lambda x, w, _: x @ w.mT, (3, 4), False),
    "at transpose": (lambda x, w, _: x @ w.transpose(0, 1), (3, 4), False),
    "einsum": (lambda x, w, _: torch.einsum("...i,oi->...o", x, w), (3, 4), False),
    "einsum inputs first": (lambda x, w, _: torch.einsum("...a, ab -> ...b", x, w), (4, 3), False),
    "einsum weight first": (lambda x, w, _: torch.einsum("oi,...i->...o", w, x), (3, 4), False),
    "linear of transpose": (lambda x, w, b: F.linear(x, w.t(), b), (4, 3), True),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("tokens", [(), (2,)])
def test_products_with_a_weight_are_linear_layers(name, tokens):
    apply, shape, bias = PRODUCTS[name]
    if tokens and "mm" in name and "matmul" not in name:
        pytest.skip("mm and addmm take matrices")
    torch.manual_seed(0)
    net = Functional(apply, shape, bias).double()
    x, y = torch.randn(6, *tokens, 4).double(), torch.randint(5, (6,))
    compiled, factors = first_factors(net, x, y)
    assert compiled.kfc.plan.block("").kind == "linear"
    assert not compiled.kfc.plan.generic

    same = nn.Linear(4, 3, bias=bias).double()
    matrix = net.weight if shape == (3, 4) else net.weight.t()
    same.weight.data.copy_(matrix)
    if bias:
        same.bias.data.copy_(net.bias)
    reference = Functional(lambda x, w, b: same(x), shape, bias).double()
    reference.head = net.head
    reference.layer = same
    _, expected = first_factors(reference, x, y)
    torch.testing.assert_close(factors[""].omega, expected["layer"].omega)
    torch.testing.assert_close(factors[""].gamma, expected["layer"].gamma)


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_a_transposed_weight_trains_as_its_linear_layer(scaling):
    torch.manual_seed(0)
    net = Functional(*PRODUCTS["addmm"]).double()
    same = nn.Linear(4, 3).double()
    same.weight.data.copy_(net.weight.t())
    same.bias.data.copy_(net.bias)
    reference = nn.Sequential(same, nn.Tanh(), nn.Linear(3, 5)).double()
    reference[2].load_state_dict(net.head.state_dict())
    x, y = torch.randn(6, 4).double(), torch.randint(5, (6,))
    for model in (net, reference):
        compiled = kfc_fx.compile(model)
        opt = kfc(compiled, lr=0.05, scaling=scaling, every=2, seed=3)
        for _ in range(5):
            F.cross_entropy(compiled(x), y).backward()
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(net.weight.t(), same.weight)
    torch.testing.assert_close(net.bias, same.bias)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_embedding(padding_idx, scaling):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 3, padding_idx=padding_idx), *head(12)).double()
    x, y = torch.randint(7, (6, 4)), torch.randint(5, (6,))
    x[0, 0] = 2
    compiled, factors = first_factors(net, x, y)
    assert compiled.kfc.plan.block("0").kind == "embedding"
    omega, gamma = exact_factors(net, net[0], x, categorical_cotangent(y))
    torch.testing.assert_close(factors["0"].omega, omega[0].diagonal())
    torch.testing.assert_close(factors["0"].gamma, gamma[0])
    before = net[0].weight.detach().clone()
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, lr=0.05, scaling=scaling)
    seen = losses(compiled, opt, x, y, 20)
    assert seen[-1] < seen[0] / 2
    absent = sorted(set(range(7)) - set(x.flatten().tolist()))
    still = absent + ([padding_idx] if padding_idx is not None else [])
    torch.testing.assert_close(net[0].weight[still], before[still], rtol=0, atol=0)


def test_an_embedding_tied_to_the_output_layer_has_one_named_outcome():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.hidden = nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(self.hidden(self.embedding(x)).mean(1), self.embedding.weight)

    compiled = kfc_fx.compile(Tied())
    plan = compiled.kfc.trace(torch.randint(5, (4, 2)))
    assert [block.name for block in plan.blocks] == ["hidden"]
    (generic,) = plan.generic
    assert generic.name == "embedding.weight"
    assert (
        "tied between calls of different kinds: embedding at embedding (Embedding)"
        in generic.reason
    )


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_a_wide_side_has_a_diagonal_factor(side, scaling, monkeypatch):
    monkeypatch.setattr(spec, "FACTOR_LIMIT", 6)
    torch.manual_seed(0)
    sizes = (8, 5) if side == "input" else (4, 8)
    net = nn.Sequential(nn.Linear(*sizes), *head(sizes[1])).double()
    x, y = torch.randn(6, sizes[0]).double(), torch.randint(5, (6,))
    monkeypatch.setattr(spec, "FACTOR_LIMIT", 6 if side == "input" else 7)
    compiled, factors = first_factors(net, x, y)
    assert f"{'Ω 9' if side == 'input' else 'Γ 8'} diagonal" in str(compiled.kfc.plan)
    omega, gamma = exact_factors(net, net[0], x, categorical_cotangent(y))
    if side == "input":
        torch.testing.assert_close(factors["0"].omega, omega[0].diagonal())
        torch.testing.assert_close(factors["0"].gamma, gamma[0])
    else:
        torch.testing.assert_close(factors["0"].omega, omega[0])
        torch.testing.assert_close(factors["0"].gamma, gamma[0].diagonal())
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, lr=0.05, scaling=scaling, every=2, refresh_every=4)
    seen = losses(compiled, opt, x, y, 20)
    assert seen[-1] < seen[0] / 2


PADDING_MODES = list(itertools.product(("zeros", "reflect", "replicate", "circular"), (1, 2)))


@pytest.mark.parametrize(("mode", "stride"), PADDING_MODES)
def test_padding_modes(mode, stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride=stride, padding=1, padding_mode=mode)
    net = nn.Sequential(layer, *head(layer(torch.zeros(1, 2, 5, 4)).numel())).double()
    x, y = torch.randn(6, 2, 5, 4).double(), torch.randint(5, (6,))
    _, factors = first_factors(net, x, y)

    plain = nn.Conv2d(2, 3, 3, stride=stride).double()
    plain.load_state_dict(layer.state_dict())
    padded = F.pad(x, (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
    omega, gamma = exact_factors(
        nn.Sequential(plain, *net[1:]), plain, padded, categorical_cotangent(y)
    )
    torch.testing.assert_close(factors["0"].omega, omega[0])
    torch.testing.assert_close(factors["0"].gamma, gamma[0])


def tokens_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Flatten(), nn.Linear(6, 5)
    ).double()


def test_reduce_averages_inputs_and_sums_gradients():
    net = tokens_net()
    x, y = torch.randn(6, 2, 4).double(), torch.randint(5, (6,))
    compiled = kfc_fx.compile(net, weight_sharing={"0": "reduce", "[4]": "reduce"})
    opt = kfc(compiled, lr=0.0, fisher="empirical")
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    assert [compiled.kfc.plan.block(n).sharing for n in "024"] == ["reduce", "expand", "reduce"]
    assert "Γ 3², reduce" in str(compiled.kfc.plan)

    hidden = net[0](x)
    output = net[1:](hidden)
    onehot = F.one_hot(y, 5).double()
    (g,) = torch.autograd.grad(output, hidden, output.detach().softmax(-1) - onehot)
    a = torch.cat([x.mean(1), torch.ones(6, 1).double()], 1)
    torch.testing.assert_close(opt.factors["0"].omega, a.T @ a / 6)
    torch.testing.assert_close(opt.factors["0"].gamma, g.sum(1).T @ g.sum(1) / 6)
    for index in (2, 4):  # one is expanded, the other has no locations to reduce
        omega, gamma = exact_factors(net, net[index], x, categorical_cotangent(y))
        torch.testing.assert_close(opt.factors[str(index)].omega, omega[0])
        torch.testing.assert_close(opt.factors[str(index)].gamma, gamma[0])


def test_wrong_weight_sharing_is_refused():
    with pytest.raises(kfc_fx.OptionError, match="weight_sharing must be one of expand, reduce"):
        kfc_fx.compile(tokens_net(), weight_sharing="mean")
    with pytest.raises(kfc_fx.OptionError, match="weight_sharing must be one of expand, reduce"):
        kfc_fx.compile(tokens_net(), weight_sharing={"*": "sum"})
    compiled = kfc_fx.compile(tokens_net(), weight_sharing={"layer*": "reduce"})
    with pytest.raises(
        kfc_fx.OptionError, match=r"no linear block matches 'layer\*'; the nearest name is"
    ):
        compiled.kfc.trace(torch.randn(6, 2, 4).double())


class Sizes(nn.Module):
    """Layers over 1, over 20 and over 5 locations of an image ``[N, 2, 5, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(4, 4)
        self.transposed = nn.ConvTranspose2d(3, 2, 2, stride=2, bias=False)
        self.head = nn.Linear(40 * 4, 5)

    def forward(self, x):
        x = self.up(self.norm(self.conv(x)))
        return self.head(self.transposed(x).flatten(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_plan_says_which_factors_grow_with_the_locations(sharing):
    plan = kfc_fx.compile(Sizes(), weight_sharing=sharing).kfc.trace(torch.randn(6, 2, 5, 4))
    found = {block.name: block.locations for block in plan.blocks}
    assert found == {"conv": 20, "norm": 20, "up": 15, "transposed": 20, "head": 1}
    growing = {block.name for block in plan.blocks if block.grows_with_locations}
    assert growing == {"conv", "transposed"} | ({"up"} if sharing == "expand" else set())
    assert "conv: conv2d, Ω 3², Γ 3², Ω over 20 locations" in str(plan)
    assert ("up: linear, Ω 5², Γ 4², reduce" in str(plan)) == (sharing == "reduce")
    assert "locations" not in str(plan).splitlines()[-1]
