"""Layers whose rows are several matrices: heads, and queries, keys and values in one layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.linalg.polar import orthogonalizers

GENERATOR = torch.Generator().manual_seed(0)
WIDTH, HEADS, HEAD = 6, 2, 4
X = torch.randn(32, 5, WIDTH, generator=GENERATOR)
Y = torch.randint(0, 7, (32,), generator=GENERATOR)
PARTS = 3 * HEADS


class Fused(nn.Module):
    """Attention whose queries, keys and values are one layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, PARTS * HEAD, bias)
        self.out, self.head = nn.Linear(HEADS * HEAD, WIDTH), nn.Linear(WIDTH, 7)

    def rows(self, x):
        return self.qkv(x)

    def forward(self, x):
        rows = self.rows(self.norm(x)).unflatten(-1, (3, HEADS, HEAD))
        q, k, v = (each.transpose(1, 2) for each in rows.unbind(2))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(seen)).mean(1))


class Apart(Fused):
    """The same with a layer for each matrix."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias)
        del self.qkv
        self.parts = nn.ModuleList(nn.Linear(WIDTH, HEAD, bias) for _ in range(PARTS))

    def rows(self, x):
        return torch.cat([part(x) for part in self.parts], -1)


def step(net: nn.Module, opt: kfc_fx.KFC) -> None:
    opt.zero_grad()
    F.cross_entropy(net(X.to(net.head.weight.dtype)), Y).backward()
    opt.step()


def qkv(scaling) -> dict:
    return {"blocks": {"qkv": scaling}}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("split", "heads"), [(3, HEADS), (1, PARTS), (PARTS, 1)])
def test_a_spectral_step_is_that_of_layers_apart(bias, split, heads):
    torch.manual_seed(0)
    fused, apart = Fused(bias).double(), Apart(bias).double()
    apart.load_state_dict(fused.state_dict(), strict=False)
    for index, part in enumerate(apart.parts):
        rows = slice(index * HEAD, (index + 1) * HEAD)
        for name, own in part.named_parameters():
            own.data.copy_(getattr(fused.qkv, name).data[rows])
    options = {"scaling": "spectral", "seed": 0}
    one = kfc_fx.KFC(fused, **options, **qkv(kfc_fx.Spectral(split=split, heads=heads)))
    other = kfc_fx.KFC(apart, **options)
    for _ in range(4):
        step(fused, one)
        step(apart, other)
    for name in ("weight", "bias") if bias else ("weight",):
        together = torch.cat([getattr(part, name) for part in apart.parts])
        torch.testing.assert_close(getattr(fused.qkv, name), together)


@pytest.mark.parametrize("limit", [512, 12], ids=["one basis", "a basis in parts"])
@pytest.mark.parametrize(
    ("split", "heads"), [(3, 1), (3, HEADS), (1, 12)], ids=["tall", "wide", "narrow"]
)
def test_an_adam_step_moves_each_matrix_towards_its_own_polar_factor(split, heads, limit):
    """That of the step without polar factors, whose moments are the same."""
    made = []
    for own in ({"split": split, "heads": heads}, {"orthogonalize": 0.0}):
        torch.manual_seed(0)
        net = Fused().double()
        statistics = kfc_fx.Statistics(basis_limit=limit)
        options = qkv(kfc_fx.Adam(**own)) | {"statistics": statistics, "seed": 0}
        made.append((net, kfc_fx.KFC(net, **options)))
    (net, opt), (plain, its) = made
    for _ in range(4):
        before = torch.cat([net.qkv.weight, net.qkv.bias[:, None]], 1).detach()
        plain.load_state_dict(net.state_dict())
        step(net, opt)
        step(plain, its)
        found, scaled = (
            torch.cat([n.qkv.weight, n.qkv.bias[:, None]], 1).detach() - before
            for n in (net, plain)
        )
        parts = scaled.unflatten(0, (split * heads, -1))
        tall = parts.shape[1] > parts.shape[2]
        parts = parts.mT if tall else parts
        (towards,) = orthogonalizers([parts @ parts.mT], 0.7)
        expected = towards @ parts
        expected = (expected.mT if tall else expected).flatten(0, 1)
        torch.testing.assert_close(found, expected)
        whole = (scaled.mT @ scaled) if scaled.shape[0] > scaled.shape[1] else scaled @ scaled.mT
        (towards,) = orthogonalizers([whole[None]], 0.7)
        assert not torch.allclose(found, scaled @ towards[0], rtol=0.01)


def test_one_part_generates_what_was_generated_before():
    sources = []
    for scaling in (kfc_fx.Adam(), kfc_fx.Adam(split=1, heads=1)):
        torch.manual_seed(0)
        net = Fused()
        opt = kfc_fx.KFC(net, scaling=scaling)
        step(net, opt)
        sources.append(opt.update_source)
    assert sources[0] == sources[1]
    assert "part_" not in sources[0]


@pytest.mark.parametrize("scaling", [kfc_fx.Adam, kfc_fx.Spectral])
def test_what_is_no_matrix_stays(scaling):
    """A scaling for all blocks parts the matrices alone."""

    class Small(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))

    net = Small()
    opt = kfc_fx.KFC(net, scaling=scaling(heads=4))
    F.cross_entropy(net(X[:, 0]), Y).backward()
    opt.step()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("heads", [5, PARTS * HEAD])
@pytest.mark.parametrize("scaling", [kfc_fx.Adam, kfc_fx.Spectral])
def test_rows_that_cannot_be_parted_are_named(scaling, heads):
    net = Fused()
    opt = kfc_fx.KFC(net, **qkv(scaling(heads=heads)))
    with pytest.raises(kfc_fx.OptionError, match=rf"heads is {heads}, and block 'qkv' has 24 rows"):
        step(net, opt)


def test_wrong_values():
    with pytest.raises(kfc_fx.OptionError, match="heads must be a whole number, at least 1"):
        kfc_fx.Adam(heads=0)
    with pytest.raises(kfc_fx.OptionError, match="split must be a whole number, at least 1"):
        kfc_fx.Spectral(split=1.5)
    with pytest.raises(kfc_fx.OptionError, match="orthogonalize is 0"):
        kfc_fx.Adam(heads=2, orthogonalize=0)
