"""Polar factors and whitening matrices: what the products converge to, and what they fall back to."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.codegen.scalings import spectral
from kfc_fx.linalg import whitening
from kfc_fx.linalg.polar import orthogonalizers, polar_factor, polar_factor_by_gram
from kfc_fx.linalg.whitening import bias_whitening, cholesky_whitening, newton_schulz_whitening


def factor(side: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Two second moments of inputs with a mean, as layers behind a ReLU have: condition 1e3."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 8 * side, side, generator=generator, dtype=dtype) + 2
    return rows.mT @ rows / rows.shape[1]


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return matrix / mean + damping * torch.eye(matrix.shape[1], dtype=matrix.dtype)


def error(w: torch.Tensor, matrix: torch.Tensor, damping: float) -> float:
    """Root mean square, by rows, of ``Wᵀ F W − I``."""
    off = w.mT @ damped(matrix, damping) @ w - torch.eye(matrix.shape[1], dtype=matrix.dtype)
    return float(torch.linalg.matrix_norm(off).max()) / matrix.shape[1] ** 0.5


POLAR_FACTORS = [
    polar_factor,
    polar_factor_by_gram,
    pytest.param(partial(polar_factor_by_gram, late=torch.bfloat16), id="late"),
]


@pytest.mark.parametrize("polar", POLAR_FACTORS)
@pytest.mark.parametrize("shape", [(2, 8, 50), (2, 50, 8), (1, 24, 24), (3, 1, 9), (3, 9, 1)])
def test_polar_factor_brings_singular_values_to_one_and_keeps_the_vectors(polar, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u * s.clamp(min=0.01 * s.max()).unsqueeze(1) @ vh
    found = polar(matrix).float()
    diagonal = (u.mT @ found @ vh.mT).diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.8
    assert diagonal.max() < 1.2
    rest = u.mT @ found @ vh.mT - torch.diag_embed(diagonal)
    assert rest.abs().max() < 0.05


@pytest.mark.parametrize("polar", POLAR_FACTORS)
def test_polar_factor_of_zero_is_zero_and_of_a_tiny_matrix_is_not(polar):
    assert not polar(torch.zeros(1, 3, 4)).any()
    tiny = polar(torch.eye(4)[None] * 1e-12).float()
    torch.testing.assert_close(tiny, torch.eye(4)[None], rtol=0.2, atol=0.2)


def adam_like(*shape: int) -> torch.Tensor:
    """Entries of one size, singular values within two decades."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).sign()
    return x + 2 * x[:, :, :1] * x[:, :1]


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_orthogonalizers_mix_a_matrix_and_its_polar_factor_at_its_own_norm(share):
    """Of several sides at once; in bfloat16 up to what the polynomials miss themselves."""
    given = [adam_like(2, 6, 9), adam_like(1, 64, 200)]
    grams = [x @ x.mT for x in given]
    for dtype, bound in ((None, 1e-5), (torch.bfloat16, 0.1)):
        for x, left in zip(given, orthogonalizers(grams, share, dtype), strict=True):
            moved = left @ x
            u, s, vh = torch.linalg.svd(x, full_matrices=False)
            norm = torch.linalg.matrix_norm(x, keepdim=True)
            a, b, c = 3.4445, -4.7750, 2.0315
            s = s / norm[:, 0]
            polar = s
            for _ in range(3):
                polar = a * polar + b * polar**3 + c * polar**5
            polar = polar / torch.linalg.vector_norm(polar, dim=1, keepdim=True)
            mixed = share * polar + (1 - share) * s
            mixed = mixed / torch.linalg.vector_norm(mixed, dim=1, keepdim=True)
            expected = (u * mixed.unsqueeze(1)) @ vh * norm
            assert torch.linalg.matrix_norm(moved - expected).max() < bound * norm.max()


@pytest.mark.parametrize("side", [1, 5, 64])
@pytest.mark.parametrize("damping", [0.3, 1e-3])
def test_cholesky_whitens(side, damping):
    matrix = factor(side)
    w, failed = cholesky_whitening(matrix, damping)
    assert error(w, matrix, damping) < 1e-3
    assert not failed.any()


@pytest.mark.parametrize("side", [5, 64])
def test_newton_schulz_follows_a_factor_that_changes(side):
    old, new = factor(side), 0.6 * factor(side) + 0.4 * factor(side, 1)
    w, _ = cholesky_whitening(old, 0.3)
    followed, failed = newton_schulz_whitening(new, w, 0.3)
    assert error(w, new, 0.3) > 1e-2, "nothing to follow"
    assert error(followed, new, 0.3) < 1e-3
    assert not failed.any()


def test_both_whitening_matrices_precondition_alike():
    """They differ by a rotation, which ``polar(m W) Wᵀ`` does not see."""
    matrix = factor(32, dtype=torch.float64)
    first, _ = cholesky_whitening(matrix, 0.3)
    second, _ = newton_schulz_whitening(matrix, torch.eye(32).double().repeat(2, 1, 1), 0.3)
    m = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = [polar_factor_by_gram(m @ w) @ w.mT for w in (first, second)]
    assert (first - second).abs().max() > 0.1
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_what_has_not_converged_is_decomposed(monkeypatch):
    monkeypatch.setattr(whitening, "ITERATIONS", 1)
    matrix = factor(64)
    calls = []
    decompose = whitening.eigendecomposition
    monkeypatch.setattr(
        whitening, "eigendecomposition", lambda f: calls.append(len(f)) or decompose(f)
    )
    w, failed = newton_schulz_whitening(matrix, torch.eye(64).repeat(2, 1, 1), 0.3)
    assert calls == [2]
    assert error(w, matrix, 0.3) < 1e-3
    assert not failed.any()


@pytest.mark.parametrize("whiten", ["cholesky", "newton_schulz"])
def test_one_bad_factor_is_the_identity_and_spares_the_others(whiten):
    matrix = factor(6)
    matrix[0, 0, 0] = float("nan")
    start = torch.eye(6).repeat(2, 1, 1)
    if whiten == "cholesky":
        w, failed = cholesky_whitening(matrix, 0.3)
    else:
        w, failed = newton_schulz_whitening(matrix, start, 0.3)
    assert failed.tolist() == [True, False]
    torch.testing.assert_close(w[0], torch.eye(6))
    assert error(w[1:], matrix[1:], 0.3) < 1e-3


def test_an_indefinite_factor_is_decomposed():
    """Rounding makes an eigenvalue negative: the damping of 1e-6 does not lift it."""
    matrix = torch.diag_embed(torch.tensor([[1.0, 1.0, -1e-5]]))
    w, failed = cholesky_whitening(matrix, 1e-6)
    assert w.isfinite().all()
    assert not failed.any()


def test_a_factor_of_zeros_is_whitened_by_its_damping():
    w, failed = cholesky_whitening(torch.zeros(1, 4, 4), 0.25)
    torch.testing.assert_close(w, 2 * torch.eye(4)[None])
    assert not failed.any()


def test_the_bias_is_whitened_in_the_units_of_the_rest():
    channel = torch.diag_embed(torch.tensor([[2.0, 6.0]]))
    weight = bias_whitening(channel, 4, torch.tensor([[[7.5]]]), 0.25)
    torch.testing.assert_close(weight, torch.tensor([[[0.5]]]))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param(lambda: nn.Linear(140, 128), (140,), id="all in bfloat16"),
        pytest.param(lambda: nn.Linear(300, 128), (300,), id="late"),
        pytest.param(lambda: nn.Conv2d(128, 128, 3), (128, 3, 3), id="late and separable"),
    ],
)
def test_spectral_in_bfloat16_steps_as_in_single_precision(monkeypatch, layer, shape):
    def step(fast: bool) -> torch.Tensor:
        monkeypatch.setattr(spectral, "has_fast_bfloat16", lambda _: fast)
        torch.manual_seed(0)
        net = layer()
        compiled = kfc_fx.compile(nn.Sequential(net, nn.Flatten()))
        # As many examples and classes as it takes for a gradient of full rank.
        x, y = torch.randn(600, *shape), torch.arange(600) % 128
        opt = kfc_fx.KFC(compiled, lr=0.1, scaling="spectral")
        before = net.weight.detach().clone()
        F.cross_entropy(compiled(x), y).backward()
        opt.step()
        return net.weight.detach() - before

    rounded, exact = step(True), step(False)
    off = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.1
