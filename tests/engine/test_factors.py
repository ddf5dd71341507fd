"""Factors against per-example sums in float64, and the scale convention."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import first_factors
from tests.options import kfc
from tests.oracle import categorical_cotangent, exact_factors

CONVS = [
    {"kernel_size": k, "stride": s, "padding": p, "dilation": d, "bias": b, "groups": g}
    for k, s, p, d, b, g in itertools.product((3,), (1, 2), (0, 1, 2), (1, 2), (True, False), (1,))
]
CONVS += [
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": 1, "bias": True},
    {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2), "bias": True},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    {"kernel_size": 1, "stride": 2, "bias": True},
    {"kernel_size": 5, "padding": 2, "bias": True},
    {"kernel_size": 3, "padding": 1, "groups": 2, "bias": True},
    {"kernel_size": 3, "groups": 2, "stride": 2, "bias": False},
]


def conv_net(options: dict) -> nn.Sequential:
    conv = nn.Conv2d(2, 4, **options)
    width = conv(torch.zeros(1, 2, 7, 6)).flatten(1).shape[1]
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(width, 5)).double()


@pytest.mark.parametrize(
    "options", CONVS, ids=lambda o: "-".join(f"{k[0]}{v}" for k, v in o.items())
)
def test_conv_factors_are_per_example_sums(options):
    torch.manual_seed(0)
    net = conv_net(options)
    x, y = torch.randn(6, 2, 7, 6).double(), torch.randint(5, (6,))
    factors = first_factors(net, x, y)[1]
    for name, layer in (("0", net[0]), ("3", net[3])):
        omega, gamma = exact_factors(net, layer, x, categorical_cotangent(y))
        torch.testing.assert_close(factors[name].omega.reshape(omega.shape), omega)
        torch.testing.assert_close(factors[name].gamma.reshape(gamma.shape), gamma)


def test_grouped_conv_has_a_leading_group_dimension():
    torch.manual_seed(0)
    net = conv_net({"kernel_size": 3, "groups": 2})
    factors = first_factors(net, torch.randn(4, 2, 7, 6).double(), torch.randint(5, (4,)))[1]
    assert factors["0"].omega.shape == (2, 10, 10)
    assert factors["0"].gamma.shape == (2, 2, 2)
    assert factors["3"].omega.dim() == 2


@pytest.mark.parametrize("input_factor", ["dense", "separable"])
def test_factor_samples_take_the_first_examples(input_factor):
    torch.manual_seed(0)
    net = conv_net({"kernel_size": 3, "padding": 1})
    x, y = torch.randn(6, 2, 7, 6).double(), torch.randint(5, (6,))

    def factors(samples, inputs, targets):
        compiled = kfc_fx.compile(net)
        options = {"fisher": "empirical", "input_factor": input_factor, "samples": samples}
        opt = kfc(compiled, lr=0.0, **options)
        F.cross_entropy(compiled(inputs), targets).backward()
        opt.step()
        return opt.factors

    part, alone = factors(2, x, y), factors(None, x[:2], y[:2])
    everything, too_many = factors(None, x, y), factors(100, x, y)
    for name in part:
        for factor in part[name].__dataclass_fields__:
            own, first = getattr(part[name], factor), getattr(alone[name], factor)
            if own is None:
                continue
            torch.testing.assert_close(own, first)
            torch.testing.assert_close(
                getattr(too_many[name], factor), getattr(everything[name], factor)
            )
            if factor != "locations":
                assert not torch.allclose(own, getattr(everything[name], factor))


@pytest.mark.parametrize(
    ("fisher", "examples", "taken"),
    [
        ("empirical", 32, 32),
        ("empirical", 100, 32),
        ("empirical", 160, 40),
        ("sampled", 128, 128),
        ("sampled", 160, 128),
        ("sampled", 300, 150),
    ],
)
def test_by_default_statistics_are_of_part_of_a_large_batch(fisher, examples, taken):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    x, y = torch.randn(examples, 4).double(), torch.randint(5, (examples,))

    def omega(inputs, targets, backend="eager", **options):
        compiled = kfc_fx.compile(net, backend=backend)
        opt = kfc(compiled, lr=0.0, fisher=fisher, **options)
        F.cross_entropy(compiled(inputs), targets).backward()
        opt.step()
        return opt.factors["2"].omega

    alone = omega(x[:taken], y[:taken], samples=None)
    for backend in ("eager", "aot_eager"):
        torch.testing.assert_close(omega(x, y, backend), alone)
    whole = omega(x, y, samples=None)
    assert torch.allclose(alone, whole) == (taken == examples)


def test_initialize_takes_the_part_of_sampled_statistics():
    """Its targets are sampled, whatever the steps take theirs from."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    compiled = kfc_fx.compile(net, likelihood="categorical")
    opt = kfc(compiled, lr=0.0, fisher="empirical")
    x = torch.randn(200, 4).double()
    opt.initialize([x])
    ones = torch.cat([x[:128], torch.ones(128, 1).double()], 1)
    torch.testing.assert_close(opt.factors["0"].omega, ones.T @ ones / 128)


def test_factor_samples_of_a_flattened_batch_take_the_same_share():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 3), nn.Flatten(0, 1), nn.Tanh(), nn.Linear(3, 5), nn.Unflatten(0, (6, 2))
    ).double()
    x, y = torch.randn(6, 2, 4).double(), torch.randint(5, (6, 2))

    def factors(samples, inputs, targets):
        compiled = kfc_fx.compile(net, likelihood=kfc_fx.Categorical(dim=-1))
        opt = kfc(compiled, lr=0.0, fisher="empirical", samples=samples)
        F.cross_entropy(compiled(inputs).movedim(-1, 1), targets, reduction="sum").backward()
        opt.step()
        return opt.factors

    part = factors(3, x, y)
    rows = x[:3].flatten(0, 1)
    ones = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    torch.testing.assert_close(part["0"].omega, ones.T @ ones / 3)
    hidden = net[0](rows).tanh().detach()
    ones = torch.cat([hidden, torch.ones(len(rows), 1).double()], 1)
    torch.testing.assert_close(part["3"].omega, ones.T @ ones / 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(), (4,), (2, 3)])
def test_linear_factors_are_per_example_sums(bias, tokens):
    torch.manual_seed(0)
    pool = nn.Flatten()
    size = 3 * max(1, torch.tensor(tokens).prod().item() if tokens else 1)
    net = nn.Sequential(nn.Linear(4, 3, bias=bias), nn.Tanh(), pool, nn.Linear(size, 5)).double()
    x, y = torch.randn(6, *tokens, 4).double(), torch.randint(5, (6,))
    factors = first_factors(net, x, y)[1]
    omega, gamma = exact_factors(net, net[0], x, categorical_cotangent(y))
    torch.testing.assert_close(factors["0"].omega, omega[0])
    torch.testing.assert_close(factors["0"].gamma, gamma[0])


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def test_a_layer_used_twice_has_the_statistics_of_both_uses():
    torch.manual_seed(0)
    net = UsedTwice().double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    factors = first_factors(net, x, y)[1]
    omega, gamma = exact_factors(net, net.shared, x, categorical_cotangent(y))
    torch.testing.assert_close(factors["shared"].omega, omega[0])
    torch.testing.assert_close(factors["shared"].gamma, gamma[0])


def test_sampled_targets_come_from_the_predictive_distribution():
    """Γ of the last layer has the mean ``diag(p) − p pᵀ`` under sampling."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4)).double()
    x = torch.randn(20000, 3).double()
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, lr=0.0, seed=7, fisher="sampled")
    F.cross_entropy(compiled(x), torch.zeros(20000, dtype=torch.long)).backward()
    opt.step()
    p = net(x).softmax(1)
    expected = torch.diag(p.mean(0)) - p.T @ p / len(p)
    assert (opt.factors["0"].gamma - expected).abs().max() < 0.01


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        ("gaussian", lambda z: torch.eye(4).double()),
        ("bernoulli", lambda z: torch.diag((z.sigmoid() * (1 - z.sigmoid())).mean(0))),
    ],
)
def test_other_likelihoods_sample_with_their_own_fisher_matrix(likelihood, expected):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4)).double()
    x = torch.randn(20000, 3).double()
    compiled = kfc_fx.compile(net, likelihood=likelihood)
    opt = kfc_fx.KFC(compiled, lr=0.0, seed=7)
    compiled(x).sum().backward()
    opt.step()
    gamma = opt.factors["0"].gamma
    assert (gamma - expected(net(x)).detach()).abs().max() < 0.03


def test_a_fixed_sample_gives_the_factors_of_that_sample():
    torch.manual_seed(0)
    net = conv_net({"kernel_size": 3, "stride": 2, "padding": 1})
    x = torch.randn(6, 2, 7, 6).double()
    sample = torch.randint(5, (6,))
    compiled = kfc_fx.compile(
        net, likelihood=lambda z: z.softmax(1) - F.one_hot(sample, 5).to(z.dtype)
    )
    opt = kfc_fx.KFC(compiled, lr=0.0)
    compiled(x).square().sum().backward()
    opt.step()
    omega, gamma = exact_factors(net, net[0], x, categorical_cotangent(sample))
    torch.testing.assert_close(opt.factors["0"].omega, omega[0])
    torch.testing.assert_close(opt.factors["0"].gamma, gamma[0])


def test_the_average_forgets_the_first_statistics():
    """As long as there are few the n-th weighs n times the first, later the decay is constant."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4)).double()
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, lr=0.0, decay=0.6, every=1)
    weights, expected = [0.2, 0.4, 0.6], 0
    for weight in weights:
        x = torch.randn(10, 3).double()
        F.cross_entropy(compiled(x), torch.zeros(10, dtype=torch.long)).backward()
        opt.step()
        opt.zero_grad()
        a = torch.cat([x, torch.ones(10, 1).double()], 1)
        expected += weight * a.T @ a / 10
    torch.testing.assert_close(opt.factors["0"].omega, expected / sum(weights))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_separable_factor_is_the_product_of_partial_traces(groups, bias):
    torch.manual_seed(0)
    net = conv_net({"kernel_size": 3, "padding": 1, "groups": groups, "bias": bias})
    x, y = torch.randn(6, 2, 7, 6).double(), torch.randint(5, (6,))
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, lr=0.0, fisher="empirical", input_factor="separable")
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    dense, _ = exact_factors(net, net[0], x, categorical_cotangent(y))
    written = opt.factors["0"].omega.reshape(dense.shape)
    channels = 2 // groups
    for found, exact in zip(written, dense, strict=True):
        blocks = exact[: channels * 9, : channels * 9].reshape(channels, 9, channels, 9)
        channel, offset = torch.einsum("akbk->ab", blocks), torch.einsum("akal->kl", blocks)
        expected = torch.kron(channel, offset) / channel.trace()
        torch.testing.assert_close(found[: channels * 9, : channels * 9], expected)
        if bias:
            torch.testing.assert_close(found[-1, -1], exact[-1, -1])
            assert not found[-1, :-1].any()
