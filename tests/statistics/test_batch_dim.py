"""Models that lead with time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from tests.models import collector_of

N, T = 5, 7


class TimeFirst(nn.Module):
    """``[T, N, C]`` to ``[T, N, C]``, without layers that mix examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, 6)
        self.one, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.one(self.tokens(x))))
        return self.last(h + h.cumsum(0))


class BatchFirst(nn.Module):
    """The same of ``[N, T]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TimeFirst()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner.norm(torch.tanh(self.inner.one(self.inner.tokens(x))))
        return self.inner.last(h + h.cumsum(1))


X = torch.randint(11, (T, N), generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (T, N), generator=torch.Generator().manual_seed(1))


def factors(net: nn.Module, x: Tensor, y: Tensor, **options) -> dict[str, dict[str, Tensor]]:
    samples, fisher = options.pop("samples", None), options.pop("fisher", "empirical")
    net = kfc_fx.compile(net, likelihood="categorical", **options)
    statistics = kfc_fx.Statistics(fisher=fisher, samples=samples)
    opt = kfc_fx.KFC(net, lr=0.0, scaling="eigen", statistics=statistics, seed=0)
    F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
    opt.step()
    return {
        name.removeprefix("inner."): {"omega": own.omega, "gamma": own.gamma}
        for name, own in opt.factors.items()
    }


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("samples", [None, 2])
def test_a_model_that_leads_with_time_has_the_factors_of_one_that_does_not(sharing, samples):
    options = {"weight_sharing": sharing, "samples": samples}
    expected = factors(BatchFirst(), X.T, Y.T, **options)
    found = factors(TimeFirst(), X, Y, batch_dim=1, **options)
    torch.testing.assert_close(found, expected)
    wrong = factors(TimeFirst(), X, Y, **options)
    assert not torch.allclose(wrong["one"]["omega"], expected["one"]["omega"], rtol=0.05)
    assert not torch.allclose(wrong["norm"]["omega"], expected["norm"]["omega"], rtol=0.05)


def test_a_compiled_graph_has_them_too():
    expected = factors(BatchFirst(), X.T, Y.T)
    found = factors(TimeFirst(), X, Y, batch_dim=1, backend="aot_eager")
    torch.testing.assert_close(found, expected)


class Speech(nn.Module):
    """``[N, C, T]`` to the ``[T, N, C]`` of CTC."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv1d(4, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.head(torch.tanh(self.body(x)).permute(2, 0, 1)), -1)


def ctc(net: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.full((len(x),), x.shape[-1])
    y = torch.randint(1, 5, (len(x), 3), generator=torch.Generator().manual_seed(2))
    return F.ctc_loss(net(x), y, lengths, torch.full((len(x),), 3))


def test_input_and_output_may_lead_with_different_dimensions():
    net = kfc_fx.compile(Speech(), batch_dim=(0, 1))
    opt = kfc_fx.KFC(net, lr=0.0, statistics=kfc_fx.Statistics(samples=None))
    x = torch.randn(N, 4, 12)
    ctc(net, x).backward()
    assert collector_of(net).sums.examples == N
    opt.step()
    assert net.kfc.likelihood == kfc_fx.Categorical(dim=-1)
    h = torch.cat([torch.tanh(net.body(x)), torch.ones(N, 1, 12)], 1).mT.flatten(0, 1)
    torch.testing.assert_close(opt.factors["head"].omega, h.T @ h / N, rtol=1e-4, atol=1e-4)


def test_what_leads_with_different_sizes_is_told_once():
    net = kfc_fx.compile(Speech())
    opt = kfc_fx.KFC(net)
    message = rf"input leads with {N} and its output with 12.*batch_dim=\(0, 1\)"
    with pytest.warns(kfc_fx.KfcWarning, match=message):
        ctc(net, torch.randn(N, 4, 12)).backward()
    opt.step()
    ctc(net, torch.randn(N, 4, 12)).backward()  # another warning would be an error


class Flattened(TimeFirst):
    """``[T, N]`` to log-probabilities ``[T * N, C]``, as language models have them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(super().forward(x).flatten(0, 1), dim=1)


def test_one_dimension_that_does_not_fit_the_output_is_told_once():
    net = kfc_fx.compile(Flattened(), batch_dim=1)
    opt = kfc_fx.KFC(net)
    message = rf"input has {N} there and its output 3:.*batch_dim=\(1, 0\)"
    with pytest.warns(kfc_fx.KfcWarning, match=message):
        F.nll_loss(net(X), Y.flatten()).backward()
    opt.step()
    F.nll_loss(net(X), Y.flatten()).backward()  # another warning would be an error


def test_an_output_that_is_flattened_has_its_examples_first():
    net = kfc_fx.compile(Flattened(), batch_dim=(1, 0))
    opt = kfc_fx.KFC(net)
    F.nll_loss(net(X), Y.flatten()).backward()
    opt.step()
    assert net.kfc.likelihood == kfc_fx.Categorical(dim=-1)


@pytest.mark.parametrize("given", [-1, "first", (0,), (0, 1, 2), (0, -1), True, 1.0, None])
def test_what_is_no_dimension_is_refused(given):
    with pytest.raises(kfc_fx.OptionError, match="batch_dim must be the dimension"):
        kfc_fx.compile(TimeFirst(), batch_dim=given)


def test_the_first_examples_are_taken_along_their_dimension():
    """Of the exact Fisher matrix."""
    found = []
    for net, x, y, dim in ((TimeFirst(), X, Y, 1), (BatchFirst(), X.T, Y.T, 0)):
        net = kfc_fx.compile(net, batch_dim=dim, likelihood="categorical")
        scaling = kfc_fx.Eigen(clip_by="exact", clip_samples=2)
        opt = kfc_fx.KFC(
            net,
            scaling=scaling,
            seed=0,
            statistics=kfc_fx.Statistics(samples=None, fisher="empirical"),
        )
        F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        opt.step()
        found.append(opt.diagnostics.last_nu)
    torch.testing.assert_close(*map(float, found))
