"""The part of a batch that each factor is estimated from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.statistics.request import LEAST_EXAMPLES, ROWS, StatisticsRequest
from kfc_fx.statistics.share import WHOLE, BatchShare
from tests.options import kfc
from tests.oracle import categorical_cotangent, exact_factors


class Layers(nn.Module):
    """A convolution of large maps, one of small maps, a transposed one, tokens, and one row."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Conv2d(2, 3, 3, padding=1)
        self.small = nn.Conv2d(3, 4, 3, stride=8)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.tokens = nn.Linear(8, 5)
        self.last = nn.Linear(20, 4)

    def forward(self, x):
        x = self.up(self.small(self.large(x).tanh()).tanh()).tanh()
        return self.last(self.tokens(x.flatten(1).unflatten(1, (4, 8))).tanh().flatten(1))


# layer -> examples of a batch of 64 for Ω: rows of 8 times its side, in [8, 32]. For Γ it is 32.
TAKEN = {
    "large": 8,  # 18 x 8 / 256
    "small": 32,  # 27 x 8 / 4
    "up": 8,  # 4 x 8 / 4
    "tokens": 16,  # 8 x 8 / 4
    "last": 32,  # one row each
}
SHARE = 32


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, 16, 16, generator=generator).double()
    return x, torch.randint(4, (64,), generator=generator)


def make(**options):
    torch.manual_seed(0)
    net = Layers().double()
    compiled = kfc_fx.compile(net)
    return net, compiled, kfc(compiled, lr=0.0, **options)


def test_input_factors_have_the_rows_that_their_side_asks_for(batch):
    x, y = batch
    net, compiled, opt = make()
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    for name, count in TAKEN.items():
        _, other, alone = make(samples=None)
        F.cross_entropy(other(x[:count]), y[:count]).backward()
        alone.step()
        torch.testing.assert_close(opt.factors[name].omega, alone.factors[name].omega, msg=name)
        if name != "up":
            layer, labels = getattr(net, name), categorical_cotangent(y[:SHARE])
            gamma = exact_factors(net, layer, x[:SHARE], labels)[1][0]
            torch.testing.assert_close(opt.factors[name].gamma, gamma, msg=name)


def test_output_factors_have_the_whole_share(batch):
    x, y = batch
    _, compiled, opt = make()
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    _, other, alone = make(samples=None)
    F.cross_entropy(other(x[:SHARE]), y[:SHARE]).backward()
    alone.step()
    for name in TAKEN:
        torch.testing.assert_close(opt.factors[name].gamma, alone.factors[name].gamma, msg=name)


@pytest.mark.parametrize("scaling", ["adam", "spectral"])
def test_statistics_of_the_input_alone_take_the_same_part(batch, scaling):
    x, y = batch
    _, compiled, opt = make(scaling=scaling)
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    _, other, alone = make(scaling=scaling, samples=TAKEN["tokens"])
    F.cross_entropy(other(x), y).backward()
    alone.step()
    torch.testing.assert_close(opt.factors["tokens"].omega, alone.factors["tokens"].omega)


@pytest.mark.parametrize("options", [{"fisher": "sampled"}, {"samples": 20}])
def test_sampled_targets_and_a_number_of_samples_set_no_limit_by_rows(batch, options):
    x, y = batch
    _, compiled, opt = make(**options)
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    count = options.get("samples", 64)
    _, other, alone = make(samples=None)
    F.cross_entropy(other(x[:count]), y[:count]).backward()
    alone.step()
    for name in TAKEN:
        torch.testing.assert_close(opt.factors[name].omega, alone.factors[name].omega)


def test_separable_factors_take_the_rows_of_their_wider_side(batch):
    x, y = batch
    _, compiled, opt = make(input_factor="separable")
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    for name, count in (("large", 8), ("small", 18)):  # sides 9, 9 x 8 / 4
        _, other, alone = make(input_factor="separable", samples=count)
        F.cross_entropy(other(x), y).backward()
        alone.step()
        for factor in ("channel", "offset"):
            own = getattr(opt.factors[name], factor)
            torch.testing.assert_close(own, getattr(alone.factors[name], factor))


@pytest.mark.parametrize("shape", [(64,), (64, 3)])
def test_an_embedding_counts_all_its_tokens_and_scales_its_part(shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(3 * (*shape, 1)[1], 4))
    x, y = torch.randint(7, shape), torch.randint(4, (64,))

    def factors(x, y, **options):
        compiled = kfc_fx.compile(net)
        opt = kfc(compiled, lr=0.0, **options)
        F.cross_entropy(compiled(x), y).backward()
        opt.step()
        return opt.factors["0"]

    found = factors(x, y)
    assert torch.equal(found.omega, torch.bincount(x.flatten(), minlength=7) / 64)
    expected = factors(x[:SHARE], y[:SHARE], samples=None).gamma
    torch.testing.assert_close(found.gamma, expected)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.last = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.tokens(x.transpose(0, 1)).tanh().mean(0))


def test_an_input_that_leads_with_time_is_not_limited_by_rows():
    """Eight moments would all be the first."""
    torch.manual_seed(0)
    net = TimeFirst().double()
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, lr=0.0)
    x = torch.randn(64, 40, 3).double()
    F.cross_entropy(compiled(x), torch.randint(4, (64,))).backward()
    opt.step()
    rows = x.transpose(0, 1)[:20].flatten(0, 1)  # half of the moments, as of the examples
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    torch.testing.assert_close(opt.factors["tokens"].omega, rows.T @ rows * 2 / 64)


@given(
    count=st.integers(1, 300),
    share=st.floats(0.01, 1),
    rows=st.floats(0.1, 100),
    least=st.integers(1, 50),
    locations=st.integers(1, 1000),
    side=st.integers(1, 1000),
    leads=st.booleans(),
)
def test_a_part_is_within_its_bounds(count, share, rows, least, locations, side, leads):
    x = torch.arange(count)[:, None]
    kept, scale = BatchShare(share, count if leads else 2 * count, rows, least).cut(
        x, locations, side
    )
    most = max(1, round(share * count))
    assert torch.equal(kept, x[: len(kept)])
    assert scale == count / len(kept)
    assert 1 <= len(kept) <= most
    if len(kept) < most:
        assert leads
        assert locations > 1
        assert len(kept) * locations >= rows * side
        assert len(kept) >= least
        assert len(kept) == least or (len(kept) - 1) * locations < rows * side
    elif leads and locations > 1:
        assert most <= least or (most - 1) * locations < rows * side


def test_a_large_batch_gives_a_sixteenth_of_it_at_least():
    request = StatisticsRequest(fisher="empirical", samples="auto")
    x = torch.zeros(4096, 1)
    for examples, kept in ((4096, 256), (512, 32), (128, 8), (32, 8), (6, 6)):
        part = request.share(examples, "empirical")
        assert len(part.cut(x[:examples], 1024, 9)[0]) == kept
        assert len(part.cut(x[:examples], 4, 1000)[0]) == max(min(32, examples), examples // 4)


def test_vectors_and_empty_batches_stay_whole():
    part = BatchShare(0.1, 100, ROWS, LEAST_EXAMPLES)
    for x in (torch.zeros(100), torch.zeros(0, 3), torch.tensor(1.0)):
        assert part.cut(x, 4, 1) == (x, 1.0)
    assert WHOLE.cut(torch.zeros(5, 2))[1] == 1.0
