"""Attention modules: a block for every projection, and results that stay the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.capture import attention
from tests.models import backward, first_factors, losses
from tests.options import kfc

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    """Attention of ``x`` over itself, or over ``memory`` made from it, and a classifier."""

    def __init__(self, *, cross: bool = False, need_weights: bool = False, **options) -> None:
        super().__init__()
        self.cross, self.need_weights = cross, need_weights
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        keys = self.attention.kdim
        self.memory = nn.Linear(WIDTH, keys) if cross else None
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x, mask=None):
        memory = self.memory(x[:, :2]) if self.cross else x
        out, weights = self.attention(
            x, memory, memory, key_padding_mask=mask, need_weights=self.need_weights
        )
        out = out.mean(1) if weights is None else (out * weights.sum(2, keepdim=True)).mean(1)
        return self.head(out)


class WrittenOut(nn.Module):
    """The same with a linear module for every projection."""

    def __init__(self, net: Attention) -> None:
        super().__init__()
        own = net.attention
        bias = own.in_proj_bias is not None
        weights = (
            own.in_proj_weight.chunk(3)
            if own._qkv_same_embed_dim
            else (own.q_proj_weight, own.k_proj_weight, own.v_proj_weight)
        )
        biases = own.in_proj_bias.chunk(3) if bias else (None,) * 3
        self.projections = nn.ModuleList()
        for weight, b in zip(weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], WIDTH, bias=bias).to(weight.dtype)
            linear.weight.data.copy_(weight)
            if bias:
                linear.bias.data.copy_(b)
            self.projections.append(linear)
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias).to(own.out_proj.weight.dtype)
        self.out.load_state_dict(own.out_proj.state_dict())
        self.memory, self.head = net.memory, net.head

    def forward(self, x):
        memory = x if self.memory is None else self.memory(x[:, :2])
        q, k, v = (
            linear(part).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear, part in zip(self.projections, (x, memory, memory), strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(attended.transpose(1, 2).flatten(2)).mean(1))


CASES = {
    "self": {},
    "self without bias": {"bias": False},
    "cross": {"cross": True},
    "cross of other widths": {"cross": True, "kdim": 6, "vdim": 6},
}


@pytest.mark.parametrize("name", CASES)
def test_every_projection_is_a_block(name):
    torch.manual_seed(0)
    net = Attention(**CASES[name]).double()
    x, y = torch.randn(6, 3, WIDTH).double(), torch.randint(5, (6,))
    compiled, factors = first_factors(net, x, y)
    _, expected = first_factors(WrittenOut(net), x, y)
    plan = compiled.kfc.plan
    if net.attention._qkv_same_embed_dim:
        block = plan.block("attention.in_proj_weight")
        assert (block.groups, block.rows, block.projections) == (3, WIDTH, 3)
        found = factors["attention.in_proj_weight"]
        pairs = [(found.omega[i], found.gamma[i]) for i in range(3)]
        assert plan.generic == ()
    else:
        names = [f"attention.{p}_proj_weight" for p in "qkv"]
        pairs = [(factors[n].omega[:-1, :-1], factors[n].gamma) for n in names if n in factors]
        assert [g.name for g in plan.generic] == ["attention.in_proj_bias"] or not plan.generic
        pairs = [(factors[n].omega, factors[n].gamma) for n in names]
    for index, (omega, gamma) in enumerate(pairs):
        other = expected[f"projections.{index}"]
        side = len(omega)
        torch.testing.assert_close(omega, other.omega[:side, :side])
        torch.testing.assert_close(gamma, other.gamma)
    torch.testing.assert_close(factors["attention.out_proj"].omega, expected["out"].omega)
    torch.testing.assert_close(factors["attention.out_proj"].gamma, expected["out"].gamma)


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
@pytest.mark.parametrize("cross", [False, True])
def test_it_trains_as_the_written_out_one(scaling, cross):
    torch.manual_seed(0)
    net = Attention(cross=cross).double()
    written = WrittenOut(net)
    if cross:
        written.memory = nn.Linear(WIDTH, WIDTH).double()
        written.memory.load_state_dict(net.memory.state_dict())
    written.head = nn.Linear(WIDTH, 5).double()
    written.head.load_state_dict(net.head.state_dict())
    x, y = torch.randn(6, 3, WIDTH).double(), torch.randint(5, (6,))
    for model in (net, written):
        compiled = kfc_fx.compile(model)
        opt = kfc(compiled, lr=0.02, scaling=scaling, every=2, fisher="empirical")
        for _ in range(6):
            F.cross_entropy(compiled(x), y).backward()
            opt.step()
            opt.zero_grad()
    packed = torch.cat([linear.weight for linear in written.projections])
    torch.testing.assert_close(net.attention.in_proj_weight, packed, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        net.attention.out_proj.weight, written.out.weight, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3},
        {"dropout": 0.3, "need_weights": True},
        {"cross": True, "dropout": 0.3},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "need_weights": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_results_and_random_numbers_stay_the_same(options, masked):
    torch.manual_seed(0)
    net = Attention(**options)
    x, y = torch.randn(6, 3, WIDTH), torch.randint(5, (6,))
    columns = 2 if options.get("cross") else 3
    mask = torch.zeros(6, columns, dtype=torch.bool) if masked else None
    if masked:
        mask[:, -1] = True
    compiled = kfc_fx.compile(net)
    _opt = kfc_fx.KFC(compiled, lr=0.1)
    results = []
    for model in (net._call_impl, compiled):
        torch.manual_seed(1)
        output = model(x, mask) if masked else model(x)
        F.cross_entropy(output, y).backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        results.append([output, *gradients, torch.rand(1)])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 16, batch_first=True, dropout=0.0, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(encoder, nn.Flatten(), nn.Linear(3 * WIDTH, 5))
    compiled = kfc_fx.compile(net, strict=True)
    opt = kfc_fx.KFC(compiled, lr=0.01)
    x, y = torch.randn(6, 3, WIDTH), torch.randint(5, (6,))
    seen = losses(compiled, opt, x, y, 15)
    assert seen[-1] < seen[0] / 2
    assert compiled.kfc.plan.generic == ()
    names = {block.name for block in compiled.kfc.plan.blocks}
    for index in range(2):
        kinds = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2", "norm1")
        assert {f"0.layers.{index}.{kind}" for kind in kinds} <= names


class Layers(nn.Module):
    """Attention of three kinds, and over fewer keys."""

    def __init__(self) -> None:
        super().__init__()
        heads, dropout = (2, 2, 4, 2, 2), (0.0, 0.0, 0.0, 0.5, 0.0)
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, h, dropout=p, batch_first=True)
            for h, p in zip(heads, dropout, strict=True)
        )
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            keys = x[:, :2] if number == 4 else x
            x = x + layer(x, keys, keys, need_weights=False)[0]
        return self.head(x.mean(1))


def test_calls_of_one_kind_are_traced_once(monkeypatch):
    traced = []
    own = attention.make_fx
    monkeypatch.setattr(attention, "make_fx", lambda *a, **k: traced.append(a) or own(*a, **k))
    torch.manual_seed(0)
    net, x = Layers(), torch.randn(6, 3, WIDTH)
    torch.manual_seed(1)
    expected = net(x)
    compiled = kfc_fx.compile(net)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    assert len(traced) == 4  # the second layer is as the first
    assert len(compiled.kfc.plan.blocks) == 5 * 2 + 2


def test_attention_under_autocast():
    torch.manual_seed(0)
    compiled = kfc_fx.compile(Attention())
    opt = kfc_fx.KFC(compiled, lr=0.01)
    x, y = torch.randn(6, 3, WIDTH), torch.randint(5, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(x)
    F.cross_entropy(output.float(), y).backward()
    opt.step()
    assert compiled.kfc.plan.block("attention.in_proj_weight").projections == 3
    assert opt.factors["attention.in_proj_weight"].omega.dtype == torch.float32


def test_batch_sizes_share_one_graph():
    torch.manual_seed(0)
    compiled = kfc_fx.compile(Attention())
    opt = kfc(compiled, lr=0.01, every=1)
    for size in (6, 4, 3, 5):
        backward(compiled, torch.randn(size, 3, WIDTH), torch.randint(5, (size,)))
        opt.step()
    assert len(compiled.kfc.graphs) == 1


def test_a_weight_whose_rows_are_read_in_pieces():
    """Like a fused projection that is cut before it is applied."""

    class Pieces(nn.Module):
        def __init__(self, cut) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))
            self.head = nn.Linear(6, 5)
            self.cut = cut

        def forward(self, x):
            return self.head(torch.cat([F.linear(x, w) for w in self.cut(self.weight)], 1).tanh())

    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(5, (6,))
    cuts = [
        lambda w: w.chunk(2),
        lambda w: w.split(3),
        lambda w: torch.split(w, [3, 3]),
        lambda w: (w[:3], w[3:]),
        lambda w: w.split(3, dim=0),
    ]
    for cut in cuts:
        net = Pieces(cut)
        compiled, factors = first_factors(net, x, y)
        assert compiled.kfc.plan.block("").projections == 2
        torch.testing.assert_close(factors[""].omega[0], x.T @ x / 6)
        torch.testing.assert_close(factors[""].omega[1], x.T @ x / 6)
    others = [
        lambda w: (w[::2], w[1::2]),
        lambda w: w.split(split_size=3),
        lambda w: torch.chunk(input=w, chunks=2),
    ]
    for cut in others:
        compiled, _ = first_factors(Pieces(cut), x, y)
        assert compiled.kfc.plan.generic[0].name == "weight"


def test_a_bias_that_is_cut_alone_leaves_the_weight_its_block():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))
            self.bias = nn.Parameter(torch.randn(6))
            self.head = nn.Linear(3, 5)

        def forward(self, x):
            return self.head(torch.addmm(self.bias[:3], x, self.weight).tanh())

    x, y = torch.randn(6, 4), torch.randint(5, (6,))
    compiled, factors = first_factors(Cut(), x, y)
    assert [g.name for g in compiled.kfc.plan.generic] == ["bias"]
    torch.testing.assert_close(factors[""].omega, x.T @ x / 6)
