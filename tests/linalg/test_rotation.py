"""Products with bases given by their parts against the bases written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfc_fx.linalg.eigenbasis import eigenbasis
from kfc_fx.linalg.lists import where_active
from kfc_fx.linalg.orthogonal_iteration import next_basis, orthogonal_iteration
from kfc_fx.linalg.rotation import (
    rotate_columns,
    rotate_product,
    rotate_rows,
    turn_moments,
    turn_second_moment,
)
from kfc_fx.linalg.whitening import (
    cholesky_whitening,
    newton_schulz_whitening,
    next_whitening,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def written_out(blocks: Tensor, entries: int, more: int = 0) -> Tensor:
    """Diagonal blocks as matrices, ``more`` columns of the identity behind them."""
    one = torch.eye(more, dtype=blocks.dtype)
    grouped = blocks.unflatten(0, (entries, -1))
    return torch.stack([torch.block_diag(*own, one) for own in grouped])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_turn_by_the_blocks_of_their_basis(parts):
    basis, matrix = random(2 * parts, 6 // parts, 6 // parts), random(2, 6, 5, seed=1)
    expected = written_out(basis, 2) @ matrix
    torch.testing.assert_close(rotate_rows(basis, matrix), expected)


@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_columns_turn_by_the_blocks_of_their_basis(parts, bias):
    basis, matrix = random(2 * parts, 6 // parts, 6 // parts), random(2, 5, 6 + bias, seed=1)
    expected = matrix @ written_out(basis, 2, bias)
    torch.testing.assert_close(rotate_columns(matrix, basis), expected)


@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize("bias", [0, 1])
def test_columns_turn_by_a_product_of_bases(bias, weight):
    channel, offset, matrix = random(2, 3, 3), random(2, 4, 4, seed=1), random(2, 5, 12 + bias)
    last = torch.full((bias, bias), 1.0 if weight is None else weight, dtype=torch.float64)
    pairs = zip(offset, channel, strict=True)
    whole = torch.stack([torch.block_diag(torch.kron(o, c), last) for o, c in pairs])
    given = None if weight is None else torch.full((2, 1, 1), weight, dtype=torch.float64)
    torch.testing.assert_close(rotate_product(matrix, channel, offset, given), matrix @ whole)


def orthonormal(seed: int, *, entries: int = 2, side: int = 4) -> Tensor:
    return torch.linalg.qr(random(entries, side, side, seed=seed)).Q


def test_moments_turn_with_dense_bases():
    m, v = random(2, 4, 4), random(2, 4, 4, seed=1).square()
    gamma, omega = (orthonormal(2), orthonormal(3)), (orthonormal(4), orthonormal(5))
    left, right = gamma[0].mT @ gamma[1], omega[0].mT @ omega[1]
    found = turn_moments(m, v, gamma=gamma, omega=omega)
    torch.testing.assert_close(found[0], left.mT @ m @ right)
    torch.testing.assert_close(found[1], left.square().mT @ v @ right.square())
    assert torch.equal(turn_second_moment(v, gamma=gamma, omega=omega), found[1])


def test_moments_turn_with_a_product_of_bases_and_one_side_alone():
    v = random(2, 3, 9).square()
    channel = orthonormal(2), orthonormal(3)
    offset = orthonormal(4, side=2), orthonormal(5, side=2)
    squares = [(old.mT @ new).square() for old, new in (channel, offset)]
    expected = rotate_product(v, *squares)
    torch.testing.assert_close(turn_second_moment(v, channel=channel, offset=offset), expected)
    assert torch.equal(turn_second_moment(v), v)


def test_the_first_basis_is_decomposed_and_the_next_ones_follow():
    root = random(2, 5, 5)
    factor, basis = root @ root.mT, orthonormal(1, side=5)
    for first, expected in (
        (True, eigenbasis(factor)),
        (False, orthogonal_iteration(factor, basis)),
    ):
        for found, wanted in zip(next_basis(factor, basis, first=first), expected, strict=True):
            assert torch.equal(found, wanted)


def test_the_first_whitening_is_decomposed_and_the_next_ones_follow():
    root = random(2, 5, 5)
    factor = root @ root.mT
    before, _ = cholesky_whitening(factor, 0.1)
    followed = newton_schulz_whitening(factor, before, 0.2)
    for first, expected in ((True, cholesky_whitening(factor, 0.2)), (False, followed)):
        found = next_whitening(factor, before, 0.2, first=first)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_inactive_entries_stay():
    active = [torch.tensor([True, False])[:, None, None], torch.ones(1, 1, 1, dtype=torch.bool)]
    new, old = (
        [torch.ones(2, 1, 2), torch.ones(1, 2, 1)],
        [torch.zeros(2, 1, 2), torch.zeros(1, 2, 1)],
    )
    found = where_active(active, new, old)
    assert found[0].tolist() == [[[1.0, 1.0]], [[0.0, 0.0]]]
    assert torch.equal(found[1], new[1])
