""" "spectral" and "eigen" against the algorithms written out per layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.linalg.polar import COEFFICIENTS, SAFETY
from tests.models import (
    IMAGES,
    LABELS,
    assert_equal,
    collector_of,
    conv_network,
    make,
    parameters,
    train,
)
from tests.options import kfc
from tests.written_out import (
    LAYERS,
    WrittenOut,
    assert_same,
    batches,
    gradients,
    network,
    run_kfc,
)


def polar_by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """What the composed polynomials make of each singular value."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (SAFETY * s.square().sum(1, keepdim=True).sqrt())
    for index, (a, b, c) in enumerate(COEFFICIENTS):
        x = s / SAFETY if index else s
        s = a * x + b * x**3 + c * x**5
    return u * s[:, None, :] @ vh


def inverse_root(factor: torch.Tensor, damping: float) -> torch.Tensor:
    """``(F / mean eigenvalue + γ I)^(−1/2)``, symmetric."""
    mean = factor.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    values, vectors = torch.linalg.eigh(factor / mean + damping * torch.eye(factor.shape[1]))
    return vectors * values.rsqrt()[:, None, :] @ vectors.mT


def whitening(plain: WrittenOut, name: str, damping: float) -> torch.Tensor:
    omega, _ = plain.factors(name)
    layer = plain.net[int(name)]
    if not (plain.separable and isinstance(layer, nn.Conv2d)):
        return inverse_root(omega, damping)
    channels, offsets = layer.weight.shape[1], layer.weight[0, 0].numel()
    whitenings = []
    for entry in plain.ema[name][0]:
        width = channels * offsets
        split = entry[:width, :width].reshape(channels, offsets, channels, offsets)
        channel, offset = torch.einsum("akbk->ab", split), torch.einsum("akal->kl", split)
        roots = [inverse_root(f[None], damping**0.5)[0] for f in (channel, offset)]
        whole = torch.kron(*roots)
        if layer.bias is not None:
            last = entry[-1:, -1:] / (channel.trace() / width) + damping
            whole = torch.block_diag(whole, last.rsqrt())
        whitenings.append(whole)
    return torch.stack(whitenings)


def written_spectral(net, data, *, lr, momentum, damping, refresh_at, separable, nesterov=True):
    plain = WrittenOut(net, separable)
    m, w = {}, {}
    for step, (x, y) in enumerate(data):
        grads = gradients(net, x, y)
        plain.accumulate(x, y)
        for name in LAYERS:
            if step in refresh_at:
                w[name] = whitening(plain, name, damping)
            g = plain.gradient(grads, name)
            m[name] = momentum * m.get(name, 0) + (1 - momentum) * g
            ahead = momentum * m[name] + (1 - momentum) * g if nesterov else m[name]
            direction = polar_by_singular_values(ahead @ w[name]) @ w[name]
            size = direction.square().sum((1, 2), keepdim=True).sqrt()
            plain.add(name, -lr * direction / size * math.sqrt(min(g.shape[1:])))


def written_eigen(
    net, data, *, lr, momentum, beta2, damping, clip, refresh_at, separable, nesterov=False
):
    """Eigenvectors of Ω written out whole, also where it is a product."""
    plain = WrittenOut(net, separable)
    p, s, basis = {}, {}, {}
    for step, (x, y) in enumerate(data):
        grads = gradients(net, x, y)
        plain.accumulate(x, y)
        vectors, nu = {}, 0.0
        for name in LAYERS:
            omega, gamma = plain.factors(name)
            if step in refresh_at:
                new = (torch.linalg.eigh(omega)[1], torch.linalg.eigh(gamma)[1])
                if name in basis:
                    turn = [(o.mT @ n) ** 2 for o, n in zip(basis[name], new, strict=True)]
                    s[name] = turn[1].mT @ s[name] @ turn[0]
                basis[name] = new
            q_omega, q_gamma = basis[name]
            g = plain.gradient(grads, name)
            rotated = q_gamma.mT @ g @ q_omega
            s[name] = beta2 * s.get(name, 0) + (1 - beta2) * rotated**2
            scaled = rotated / (len(x) * s[name] / (1 - beta2 ** (step + 1)) + damping)
            vectors[name] = -lr * q_gamma @ scaled @ q_omega.mT
            nu += float(-lr * (g * vectors[name]).sum())
        scale = min(1.0, math.sqrt(clip / nu)) if clip else 1.0
        for name in LAYERS:
            v = scale * vectors[name]
            p[name] = momentum * p.get(name, 0) + v
            plain.add(name, momentum * p[name] + v if nesterov else p[name])


@pytest.mark.parametrize("steps", [1, 11])
@pytest.mark.parametrize("input_factor", ["dense", "separable"])
@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_spectral_steps_equal_the_algorithm_written_out(steps, input_factor, momentum):
    found, expected, data = network(), network(), batches(steps)
    run_kfc(
        found, data, lr=0.02, scaling="spectral", momentum=momentum, damping=0.2,
        every=1, refresh_every=10, input_factor=input_factor,
    )  # fmt: skip
    written_spectral(
        expected, data, lr=0.02, momentum=momentum, damping=0.2,
        refresh_at=(*range(9), 10), separable=input_factor == "separable",
    )  # fmt: skip
    assert_same(found, expected, 1e-8)


@pytest.mark.parametrize("steps", [1, 11])
@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("input_factor", ["dense", "separable"])
def test_eigen_steps_equal_the_algorithm_written_out(steps, clip, input_factor):
    found, expected, data = network(), network(), batches(steps)
    # So slow that eleven steps do not blow up what eigenvectors are rounded by.
    options = {"lr": 0.01, "momentum": 0.8, "damping": 1e-2, "clip": clip}
    run_kfc(found, data, scaling="eigen", every=1, input_factor=input_factor, **options)
    written_eigen(
        expected, data, beta2=0.95, refresh_at=(*range(9), 10),
        separable=input_factor == "separable", **options,
    )  # fmt: skip
    assert_same(found, expected, 1e-6)


def test_spectral_and_eigen_steps_with_the_other_momentum():
    """Without Nesterov's step ahead, and with it."""
    found, expected, data = network(), network(), batches(3)
    options = {"lr": 0.02, "momentum": 0.9, "damping": 0.2, "nesterov": False}
    run_kfc(found, data, scaling="spectral", input_factor="dense", **options)
    written_spectral(expected, data, refresh_at=(0, 1, 2), separable=False, **options)
    assert_same(found, expected, 1e-8)
    found, expected = network(), network()
    options = {"lr": 0.05, "momentum": 0.8, "damping": 1e-3, "clip": 1e-3, "nesterov": True}
    run_kfc(found, data, scaling="eigen", **options)
    written_eigen(expected, data, beta2=0.95, refresh_at=(0, 1, 2), separable=False, **options)
    assert_same(found, expected, 1e-6)


def test_eigen_is_clipped_by_the_exact_fisher_too():
    net, data = network(), batches(3)
    opt = run_kfc(net, data, lr=0.05, scaling="eigen", clip=1e-4, clip_by="exact", momentum=0.0)
    assert opt.diagnostics.clip_scale < 1
    assert opt.diagnostics.nu * opt.diagnostics.clip_scale**2 == pytest.approx(1e-4)


def test_spectral_runs_no_backward_pass_for_statistics_and_keeps_no_gamma(monkeypatch):
    compiled, opt = make(scaling="spectral")
    calls = []
    gradient = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or gradient(*args, **kwargs)
    )
    train(compiled, opt, 7)
    assert not calls
    assert opt.diagnostics.statistics_steps == 7
    assert not any("gamma" in own for own in opt._engine.state.values())
    with pytest.raises(kfc_fx.KfcError, match="no output factor"):
        _ = next(iter(opt.factors.values())).gamma


def test_input_factors_are_those_of_the_other_scalings():
    """Taken in the forward pass, in micro-batches, of a part of the batch: the same Ω."""
    for options in ({}, {"input_factor": "separable"}, {"samples": 5}):
        found = {}
        for scaling in ("adam", "spectral"):
            compiled, opt = make(scaling=scaling, lr=0.0, **options)
            for part in (slice(0, 6), slice(6, 12)):
                F.cross_entropy(compiled(IMAGES[part]), LABELS[part]).backward()
            opt.step()
            found[scaling] = opt.factors
        assert found["spectral"]
        for name, factors in found["spectral"].items():
            rounding = 2e-6 * float(factors.omega.max())  # of "adam", which keeps eigenvalues
            torch.testing.assert_close(
                found["adam"][name].omega, factors.omega, rtol=0, atol=rounding
            )


class EveryKind(nn.Module):
    """One layer of every kind that is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 6, 4) / 3)
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        x = self.up(self.conv(x).tanh()).flatten(2)[:, :, :6]
        x = self.attention(x, x, x, need_weights=False)[0]
        x = torch.bmm(x.transpose(0, 1), self.experts).transpose(0, 1)
        return self.last(x.tanh().mean(1))


def test_every_kind_of_matrix_has_the_input_factor_of_the_other_scalings():
    x, y = torch.randn(12, 2, 4, 4), torch.arange(12) % 5
    found = {}
    for scaling in ("adam", "spectral"):
        compiled, opt = make(EveryKind(), scaling=scaling, lr=0.0, samples=None)
        F.cross_entropy(compiled(x), y).backward()
        opt.step()
        found[scaling] = opt.factors
    assert set(found["spectral"]) == set(found["adam"]) >= {"conv", "up", "experts", "last"}
    for name, factors in found["spectral"].items():
        torch.testing.assert_close(factors.omega, found["adam"][name].omega)


def test_statistics_wait_for_the_backward_pass():
    """``zero_grad`` between forward and backward pass loses none, a forward pass alone adds none."""
    compiled, opt = make(scaling="spectral")
    compiled(IMAGES)
    output = compiled(IMAGES)
    opt.zero_grad()
    assert not collector_of(compiled).sums.blocks
    F.cross_entropy(output, LABELS).backward()
    assert collector_of(compiled).sums.examples == len(IMAGES)
    opt.step()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_input_factors_of_compiled_graphs(backend):
    eager, expected = make(conv_network(), scaling="spectral", samples=None)
    compiled = kfc_fx.compile(conv_network(), backend=backend)
    every_step = kfc_fx.Statistics(budget=None, samples=None)
    opt = kfc_fx.KFC(compiled, 0.01, scaling="spectral", statistics=every_step, seed=3)
    for _ in range(3):
        for model, optimizer in ((eager, expected), (compiled, opt)):
            torch.manual_seed(0)
            F.cross_entropy(model(IMAGES), LABELS).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, factors in opt.factors.items():
        torch.testing.assert_close(
            factors.omega, expected.factors[name].omega, rtol=1e-3, atol=1e-4
        )


def test_spectral_leaves_tables_and_norms_to_adamw_at_their_own_rate():
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 5))

    tokens = torch.randint(5, (12, 2), generator=torch.Generator().manual_seed(0))
    found, expected = net(), net()
    compiled = kfc_fx.compile(found)
    opt = kfc(compiled, lr=0.02, scaling="spectral", lr_ratio=0.25)
    rest = [*expected[0].parameters(), *expected[1].parameters()]
    reference = torch.optim.AdamW(rest, lr=0.005, weight_decay=0.0)
    F.cross_entropy(compiled(tokens), LABELS[:12]).backward()
    F.cross_entropy(expected(tokens), LABELS[:12]).backward()
    opt.step()
    reference.step()
    assert [g.name for g in opt._engine.spec.generic] == ["0.weight", "1.weight", "1.bias"]
    for f, e in zip([*found[0].parameters(), *found[1].parameters()], rest, strict=True):
        torch.testing.assert_close(f, e)


def test_spectral_refuses_a_model_without_a_matrix():
    compiled, opt = make(nn.Sequential(nn.Embedding(5, 5)), scaling="spectral")
    F.cross_entropy(compiled(LABELS), LABELS).backward()
    with pytest.raises(kfc_fx.OptionError, match="takes scaling='spectral'"):
        opt.step()


HARD_CASES = {
    "dead units": lambda net, x: (net[0].bias.data.fill_(-1e4), x)[1],
    "constant input": lambda net, x: torch.ones_like(x),
    "zero input": lambda net, x: torch.zeros_like(x),
    "a batch of one": lambda net, x: x[:1],
}


@pytest.mark.parametrize("scaling", ["adam", "spectral", "eigen", "inverse"])
@pytest.mark.parametrize("input_factor", ["dense", "separable"])
@pytest.mark.parametrize("case", HARD_CASES)
def test_hard_cases_stay_finite(scaling, input_factor, case):
    net = network().float()
    x = HARD_CASES[case](net, torch.randn(8, 2, 7, 7, generator=torch.Generator().manual_seed(0)))
    compiled, opt = make(net, scaling=scaling, input_factor=input_factor)
    for _ in range(6):
        F.cross_entropy(compiled(x), LABELS[: len(x)]).backward()
        opt.step()
        opt.zero_grad()
    assert all(p.isfinite().all() for p in net.parameters())
    assert opt.diagnostics.skipped_steps == 0


@pytest.mark.parametrize("scaling", ["adam", "spectral", "eigen", "inverse"])
def test_zero_gradients_move_nothing_but_by_momentum(scaling):
    net = network().float()
    compiled, opt = make(net, scaling=scaling, generic="sgd", likelihood="gaussian")
    before = parameters(net)
    (compiled(torch.randn(8, 2, 7, 7)) * 0).sum().backward()
    opt.step()
    assert_equal(parameters(net), before)


@pytest.mark.parametrize("scaling", ["spectral", "eigen"])
@pytest.mark.parametrize("input_factor", ["dense", "separable"])
def test_resumed_in_the_middle_of_an_interval_bit_for_bit(scaling, input_factor, tmp_path):
    options = {"scaling": scaling, "input_factor": input_factor, "every": 3}
    options |= {"refresh_every": 6}
    compiled, opt = make(conv_network(), **options)
    train(compiled, opt, 4)
    torch.save({"model": compiled.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    train(compiled, opt, 4)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again, other = make(conv_network(), **options)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    train(again, other, 4)
    assert_equal(parameters(again), parameters(compiled))
