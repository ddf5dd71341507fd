"""Wide factors in parts: diagonal blocks with a basis of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.plan.forms import parts_of
from tests.models import collector_of
from tests.options import kfc
from tests.oracle import categorical_cotangent, exact_factors


def diagonal_blocks(matrix: Tensor, parts: int, side: int) -> Tensor:
    """A matrix with zeros beside ``parts`` blocks on the diagonal of its first ``side`` rows, and
    of the rows after these (the bias) their own entries alone."""
    mask = torch.zeros_like(matrix)
    for start in range(0, side, side // parts):
        stop = start + side // parts
        mask[start:stop, start:stop] = 1
    mask[side:, side:] = 1
    return matrix * mask


def first_step(net: nn.Module, x: Tensor, y: Tensor, **options: object) -> kfc_fx.KFC:
    """The optimizer after one batch, with its true targets."""
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, lr=0.0, fisher="empirical", **options)
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    return opt


LAYERS = {
    "linear": (nn.Linear(12, 8), (12,), 3, 2),
    "linear without bias": (nn.Linear(12, 8, bias=False), (12,), 3, 2),
    "tokens": (nn.Linear(8, 4), (5, 8), 2, 1),
    "pointwise": (nn.Conv2d(8, 12, 1), (8, 2, 2), 2, 3),
    "strided": (nn.Conv2d(8, 12, 1, stride=2, bias=False), (8, 4, 4), 2, 3),
    "conv": (nn.Conv2d(2, 12, 3, padding=1), (2, 3, 3), 1, 3),
    "groups": (nn.Conv2d(16, 16, 1, groups=2), (16, 2, 2), 2, 2),
    "transposed": (nn.ConvTranspose2d(8, 6, 2, bias=False), (8, 2, 2), 2, 6),
    "transposed, wide kernel": (nn.ConvTranspose2d(4, 3, 3, bias=False), (4, 2, 2), 1, 3),
    "transposed, groups": (nn.ConvTranspose1d(8, 8, 4, groups=2, bias=False), (8, 3), 1, 4),
}


def network(layer: nn.Module, shape: tuple[int, ...]) -> nn.Sequential:
    layer = copy.deepcopy(layer)
    width = layer(torch.zeros(1, *shape)).numel()
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)).double()


@pytest.mark.parametrize("case", LAYERS)
def test_factors_are_the_diagonal_blocks_of_whole_ones(case):
    layer, shape, input_parts, output_parts = LAYERS[case]
    torch.manual_seed(0)
    net = network(layer, shape)
    x, y = torch.randn(6, *shape).double(), torch.randint(3, (6,))
    opt = first_step(net, x, y, basis_limit=4)
    factors = opt.factors
    stack = next(s for s in opt._engine.spec.stacks if "0" in s.spans)
    assert (stack.forms.input_parts, stack.forms.output_parts) == (input_parts, output_parts)
    omega, gamma = exact_factors(net, net[0], x, categorical_cotangent(y))
    groups = getattr(layer, "groups", 1)
    channels, rows = stack.first.channels * stack.first.offsets, stack.first.rows
    whole = factors["0"].omega.reshape(groups, *omega.shape[1:])
    for index in range(groups):
        expected = omega[index]
        if input_parts > 1:
            expected = diagonal_blocks(expected, input_parts, channels)
        torch.testing.assert_close(whole[index], expected)
        expected = diagonal_blocks(gamma[index], output_parts, rows)
        torch.testing.assert_close(factors["0"].gamma.reshape(groups, rows, rows)[index], expected)


@pytest.mark.parametrize("scaling", ["adam", "eigen"])
@pytest.mark.parametrize("case", LAYERS)
def test_steps_are_those_of_factors_with_zeros_beside_the_blocks(case, scaling):
    """The same optimizer, without parts, on statistics that are cut by hand."""
    layer, shape, input_parts, output_parts = LAYERS[case]
    torch.manual_seed(0)
    cut, whole = network(layer, shape), network(layer, shape)
    whole.load_state_dict(cut.state_dict())
    options = {"lr": 0.01, "scaling": scaling, "fisher": "empirical", "input_factor": "dense"}
    models = [kfc_fx.compile(net) for net in (cut, whole)]
    limits = {"basis_limit": 4}, {"basis_limit": 1000}
    optimizers = [
        kfc(model, **options, **limit) for model, limit in zip(models, limits, strict=True)
    ]
    groups = getattr(layer, "groups", 1)
    head = parts_of(cut[3].in_features, 4)
    for _ in range(4):
        x, y = torch.randn(6, *shape).double(), torch.randint(3, (6,))
        for model, opt in zip(models, optimizers, strict=True):
            F.cross_entropy(model(x), y).backward()
            if model is models[1]:
                sums = collector_of(model).sums.blocks
                channels = sums["0"]["omega"].shape[1] - (layer.bias is not None)
                for index in range(groups):
                    omega, gamma = sums["0"]["omega"], sums["0"]["gamma"]
                    if input_parts > 1:
                        omega[index] = diagonal_blocks(omega[index], input_parts, channels)
                    gamma[index] = diagonal_blocks(gamma[index], output_parts, gamma.shape[1])
                if head > 1:
                    omega = sums["3"]["omega"]
                    omega[0] = diagonal_blocks(omega[0], head, cut[3].in_features)
            opt.step()
            opt.zero_grad()
    for (name, found), expected in zip(cut.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: n + m
        )


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_embeddings_and_packed_projections_have_parts():
    torch.manual_seed(0)
    net = Tokens().double()
    x, y = torch.randint(7, (5, 6)), torch.randint(3, (5,))
    whole = first_step(copy.deepcopy(net), x, y).factors
    opt = first_step(net, x, y, basis_limit=4)
    factors = opt.factors
    assert {s.key for s in opt._engine.spec.stacks} >= {"8p2x7d", "8p2x9p2", "3x9p2"}
    for name, own in factors.items():
        omega, gamma = whole[name].omega, whole[name].gamma
        cut = gamma.clone()
        for entry in cut.reshape(-1, *gamma.shape[-2:]):
            entry.copy_(diagonal_blocks(entry, 2 if len(entry) == 8 else 1, len(entry)))
        torch.testing.assert_close(own.gamma, cut)
        if omega.dim() == 1:
            torch.testing.assert_close(own.omega, omega)
            continue
        cut = omega.clone()
        for entry in cut.reshape(-1, *omega.shape[-2:]):
            entry.copy_(diagonal_blocks(entry, 2, 8))
        torch.testing.assert_close(own.omega, cut)


def test_a_resumed_run_goes_on_bit_for_bit():
    torch.manual_seed(0)
    net = network(*LAYERS["linear"][:2])
    data = [(torch.randn(6, 12).double(), torch.randint(3, (6,))) for _ in range(4)]

    def run(model, opt, batches):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()

    other = copy.deepcopy(net)
    model = kfc_fx.compile(net)
    opt = kfc(model, seed=1, basis_limit=4)
    run(model, opt, data[:2])
    other.load_state_dict(net.state_dict())
    resumed = kfc_fx.compile(other)
    again = kfc(resumed, seed=1, basis_limit=4)
    again.load_state_dict(opt.state_dict())
    for each in ((model, opt), (resumed, again)):
        run(*each, data[2:])
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_parts_divide_a_side_and_are_not_slivers():
    sides = {512: 1, 1000: 2, 1024: 2, 2048: 4, 768: 2, 513: 3, 1021: 1}
    assert {side: parts_of(side, 512) for side in sides} == sides


@pytest.mark.parametrize("limit", [0, 2.5])
def test_a_limit_that_is_no_whole_number_is_refused(limit):
    with pytest.raises(kfc_fx.OptionError, match="basis_limit must be a whole number"):
        kfc(kfc_fx.compile(nn.Linear(3, 2)), basis_limit=limit)
