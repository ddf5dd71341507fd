"""Products with a weight ``[E, ...]``: a block for each entry, against sums row by row."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import kfc_fx
from kfc_fx.tools.cli import app
from tests.models import first_factors, losses
from tests.options import kfc
from tests.oracle import batched_factors, categorical_cotangent

E, C, R, N = 3, 4, 5, 6


def entries_first(args: tuple[Tensor, ...], g: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(args[0], g, strict=True))


def entries_last(args: tuple[Tensor, ...], g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``[..., E, C]``."""
    return [(args[0][..., e, :].reshape(-1, C), g[..., e, :].reshape(-1, R)) for e in range(E)]


def shared_input(args: tuple[Tensor, ...], g: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(args[0], g[e]) for e in range(E)]


def columns(args: tuple[Tensor, ...], g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``[N, E, C, T]``."""
    return [
        (torch.cat([x[e].T for x in args[0]]), torch.cat([own[e].T for own in g])) for e in range(E)
    ]


def middle(args: tuple[Tensor, ...], g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``[N, E, T, C]``."""
    return [(args[0][:, e].flatten(0, 1), g[:, e].flatten(0, 1)) for e in range(E)]


@dataclass(frozen=True)
class Case:
    """A product, the shape of its weight, how its input is made of ``[N, E, T, C]``."""

    apply: object
    shape: tuple[int, ...]
    make: object
    rows_of: object
    bias: tuple[int, ...] | None = None


def stacked(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1, 2)


def loop(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.stack([F.linear(x[:, e], w[e], b[e]) for e in range(E)], 1)


def unbound(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
    parts = [x[:, e] @ own.t() for e, own in enumerate(w.unbind(0))]
    return torch.stack(parts, 1)


def two_parts(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
    return torch.cat([x[:1] @ w[:1], torch.bmm(x[1:], w[1:])])


FIRST, SECOND = (E, C, R), (E, R, C)
CASES = {
    "baddbmm": Case(
        lambda x, w, b: torch.baddbmm(b, x, w), FIRST, stacked, entries_first, (E, 1, R)
    ),
    "baddbmm method": Case(
        lambda x, w, b: b.baddbmm(x, w), FIRST, stacked, entries_first, (E, 1, R)
    ),
    "bmm": Case(lambda x, w, _: torch.bmm(x, w), FIRST, stacked, entries_first),
    "bmm method": Case(lambda x, w, _: x.bmm(w), FIRST, stacked, entries_first),
    "at": Case(lambda x, w, _: x @ w, FIRST, stacked, entries_first),
    "at mT": Case(lambda x, w, _: x @ w.mT, SECOND, stacked, entries_first),
    "at transpose": Case(lambda x, w, _: x @ w.transpose(-1, -2), SECOND, stacked, entries_first),
    "at permute": Case(lambda x, w, _: x @ w.permute(0, 2, 1), SECOND, stacked, entries_first),
    "einsum": Case(
        lambda x, w, _: torch.einsum("enc,eco->eno", x, w), FIRST, stacked, entries_first
    ),
    "at batched": Case(lambda x, w, _: x @ w, FIRST, lambda x: x, middle),
    "einsum entries last": Case(
        lambda x, w, _: torch.einsum("ntec,eco->nteo", x, w),
        FIRST,
        lambda x: x.transpose(1, 2),
        entries_last,
    ),
    "einsum ellipsis": Case(
        lambda x, w, _: torch.einsum("...ec,eoc->...eo", x, w),
        SECOND,
        lambda x: x.transpose(1, 2),
        entries_last,
    ),
    "einsum weight first": Case(
        lambda x, w, _: torch.einsum("eoc,...ec->...eo", w, x),
        SECOND,
        lambda x: x.transpose(1, 2),
        entries_last,
    ),
    "weight at": Case(lambda x, w, _: w @ x, SECOND, lambda x: x.transpose(2, 3), columns),
    "one input": Case(lambda x, w, _: x @ w, FIRST, lambda x: x[:, 0, 0], shared_input),
    "loop": Case(loop, SECOND, lambda x: x, middle, (E, R)),
    "unbind": Case(unbound, SECOND, lambda x: x, middle),
    "parts": Case(two_parts, FIRST, stacked, entries_first),
}


class Product(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(case.shape) / 2)
        self.bias = nn.Parameter(torch.randn(case.bias)) if case.bias else None
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        return self.case.apply(x, self.weight, self.bias)


class Net(nn.Module):
    """``[N, E, T, C]`` through a batched map, then a head that tells all entries apart."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.product, self.head = case, Product(case), nn.Linear(R, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.case.make(x))
        if self.case.rows_of is columns:
            rows = y.transpose(2, 3).flatten(1, 2)
        elif self.case.rows_of in (entries_first, shared_input):
            rows = y.unflatten(1, (len(x), -1)).transpose(0, 1).flatten(1, 2)
        else:
            rows = y.flatten(1, 2)
        scale = torch.linspace(0.5, 2, rows.shape[1], dtype=x.dtype)
        return self.head((rows.sin() * scale[:, None]).sum(1))


@pytest.mark.parametrize("name", CASES)
def test_every_entry_is_a_block(name):
    torch.manual_seed(0)
    net = Net(CASES[name]).double()
    x, y = torch.randn(N, E, 2, C).double(), torch.randint(5, (N,))
    compiled, factors = first_factors(net, x, y)
    block = compiled.kfc.plan.block("product")
    assert (block.kind, block.groups) == ("batched_linear", E)
    assert not compiled.kfc.plan.generic
    expected = batched_factors(net, net.product, x, categorical_cotangent(y), CASES[name].rows_of)
    torch.testing.assert_close(factors["product"].omega, expected[0])
    torch.testing.assert_close(factors["product"].gamma, expected[1])


class Routed(nn.Module):
    """Tokens ``[S, C]`` by the entry that each is given to; sorted, multiplied, put back."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        shape = (E, R, C) if transposed else (E, C, R)
        self.weight = nn.Parameter(torch.randn(shape) / 2)
        self.transposed = transposed

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        order = torch.argsort(ids, stable=True)
        ends = (ids[:, None] == torch.arange(E)).sum(0).cumsum(0).to(torch.int32)
        weight = self.weight.transpose(-2, -1) if self.transposed else self.weight
        product = torch.ops.transformers.grouped_mm_fallback(x[order], weight, offs=ends)
        return torch.zeros_like(product).index_copy(0, order, product)


class Experts(nn.Module):
    def __init__(self, transposed: bool, unseen: int) -> None:
        super().__init__()
        self.product, self.head, self.unseen = Routed(transposed), nn.Linear(R, 5), unseen

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        ids = (tokens.sum(-1) * 10).long().abs() % (E - self.unseen)
        y = self.product(tokens.flatten(0, 1), ids.flatten()).unflatten(0, (len(x), -1))
        return self.head((y.sin() * torch.linspace(0.5, 2, y.shape[1])[:, None]).sum(1))


def routed(args: tuple[Tensor, ...], g: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(args[0][args[1] == e], g[args[1] == e]) for e in range(E)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("unseen", [0, 1])
def test_experts_that_see_some_tokens_each(transposed, unseen):
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    net = Experts(transposed, unseen).double()
    net.head.weight.data.mul_(2)
    x, y = torch.randn(N, E, 2, C).double(), torch.randint(5, (N,))
    compiled, factors = first_factors(net, x, y)
    assert not compiled.kfc.plan.generic
    omega, gamma = batched_factors(net, net.product, x, categorical_cotangent(y), routed)
    seen = E - unseen
    torch.testing.assert_close(factors["product"].omega[:seen], omega[:seen])
    torch.testing.assert_close(factors["product"].gamma[:seen], gamma[:seen])
    assert not omega[seen:].any()


class Ensemble(nn.Module):
    """Maps in one tensor each, or a layer for each map."""

    def __init__(self, layers: list[nn.Linear] | None) -> None:
        super().__init__()
        self.apart = nn.ModuleList(layers or [])
        if not layers:
            self.weight = nn.Parameter(torch.randn(E, C, R) / 2)
            self.bias = nn.Parameter(torch.randn(E, 1, R) / 2)
        self.head = nn.Linear(R, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.apart:
            y = torch.stack([layer(x[:, e, 0]) for e, layer in enumerate(self.apart)])
        else:
            y = torch.baddbmm(self.bias, x[:, :, 0].transpose(0, 1), self.weight)
        return self.head(y.tanh().sum(0))


@pytest.mark.parametrize("scaling", ["adam", "inverse", "eigen", "spectral"])
def test_it_trains_as_layers_that_are_apart(scaling):
    torch.manual_seed(0)
    layers = [nn.Linear(C, R) for _ in range(E)]
    stacked, apart = Ensemble(None), Ensemble(layers)
    stacked.weight.data.copy_(torch.stack([layer.weight.T for layer in layers]))
    stacked.bias.data.copy_(torch.stack([layer.bias[None] for layer in layers]))
    stacked.head.load_state_dict(apart.head.state_dict())
    x, y = torch.randn(N, E, 2, C).double(), torch.randint(5, (N,))
    for net in (stacked, apart):
        compiled = kfc_fx.compile(net.double())
        opt = kfc(compiled, lr=0.05, scaling=scaling, every=2, seed=3)
        seen = losses(compiled, opt, x, y, 6)
        assert seen[-1] < seen[0]
    torch.testing.assert_close(stacked.weight.mT, torch.stack([p.weight for p in layers]))
    torch.testing.assert_close(stacked.bias[:, 0], torch.stack([p.bias for p in layers]))


def test_compiled_backends_take_the_same_statistics():
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    net = Experts(True, 0)
    x, y = torch.randn(N, E, 2, C), torch.randint(5, (N,))
    found = []
    for backend in ("eager", "aot_eager"):
        compiled = kfc_fx.compile(net, backend=backend)
        opt = kfc(compiled, lr=0.0, fisher="empirical")
        F.cross_entropy(compiled(x), y).backward()
        opt.step()
        found.append(opt.factors["product"])
    torch.testing.assert_close(found[0].omega, found[1].omega)
    torch.testing.assert_close(found[0].gamma, found[1].gamma)


class Other(nn.Module):
    """Products with a weight of three dimensions that are no map for each of its entries."""

    def __init__(self, apply) -> None:
        super().__init__()
        self.weight, self.apply_layer = nn.Parameter(torch.randn(E, C, R)), apply

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_layer(x, self.weight)


OTHERS = {
    "summed over entries": lambda x, w: torch.einsum("netc,ecr->nr", x, w),
    "diagonal": lambda x, w: torch.einsum("netc,ecr->ner", x, w).flatten(1),
    "picked by data": lambda x, w: torch.bmm(x[:, 0], w[x[:, 0, 0, 0].long().abs() % E])[:, 0],
    "transposed over entries": lambda x, w: x[:, :, 0, 0] @ w.transpose(0, 1)[0],
    "scaled": lambda x, w: torch.baddbmm(x[:E, 0, :, :1], x[:E, 0], w, alpha=2)[:, 0],
    "in two steps": lambda x, w: x[:, 0, 0] @ w[0][:, :3],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_are_generic_with_their_use(name):
    compiled = kfc_fx.compile(Other(OTHERS[name]))
    plan = compiled.kfc.trace(torch.randn(N, E, 2, C))
    assert not plan.blocks
    (generic,) = plan.generic
    assert generic.reason.startswith("used by node ")


class TwoProducts(nn.Module):
    """What ``kfc-fx inspect`` is shown: experts and an ensemble, for tokens ``[N, 3, 2, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.ensemble = Experts(True, 0), Ensemble(None)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x) + self.ensemble(x)


def test_inspect_counts_them():
    pytest.importorskip("transformers.integrations.moe")
    target = "tests.plan.test_batched_linear:TwoProducts"
    result = CliRunner().invoke(app, ["inspect", target, "--input", "6x3x2x4", "--view", "json"])
    assert result.exit_code == 0, result.output
    blocks = {block["name"]: block for block in json.loads(result.stdout)["blocks"]}
    routed, stacked = blocks["experts.product"], blocks["ensemble"]
    assert (routed["kind"], routed["groups"], routed["method"]) == ("batched_linear", E, "row")
    assert routed["flops"] == 2 * (N * E * 2) * (C**2 + R**2)
    assert (stacked["columns"], stacked["groups"]) == (C + 1, E)
    assert stacked["flops"] == 2 * N * E * (C**2 + R**2)
