"""Nested tensors, complex layers, buffers that come and grow: trained, or named with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import make_always_due

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


def step(compiled, opt, x=X, y=Y) -> float:
    loss = F.cross_entropy(compiled(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


# -- nested tensors ------------------------------------------------------------------------

ROWS = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 3, 4)]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        if x.is_nested:
            return self.second(self.norm(self.first(x).relu())).to_padded_tensor(0.0).sum(1)
        return self.second(self.norm(self.first(x).relu()))


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor(ROWS, layout=torch.jagged)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("scaling", ["adam", "spectral"])
def test_linear_layers_on_jagged_tensors_are_blocks_and_norms_are_named(fisher, scaling):
    torch.manual_seed(0)
    compiled, opt = make_always_due(Nested(), fisher=fisher, scaling=scaling)
    losses = [step(compiled, opt, jagged(), Y[:3]) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert {block.name for block in compiled.kfc.plan.blocks} == {"first", "second"}
    reasons = {generic.name: generic.reason for generic in compiled.kfc.plan.generic}
    assert set(reasons) == {"norm.weight", "norm.bias"}
    assert "nested tensor" in reasons["norm.weight"]


def test_factors_of_jagged_tensors_are_sums_over_all_rows():
    torch.manual_seed(0)
    net = Nested()
    compiled, opt = make_always_due(copy.deepcopy(net), lr=0.0, fisher="empirical", samples=None)
    step(compiled, opt, jagged(), Y[:3])
    omega = opt.factors["first"].omega
    rows = torch.cat(ROWS)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    torch.testing.assert_close(omega.reshape(5, 5), rows.T @ rows / 3)
    rows = net.first(torch.cat(ROWS))
    gradients: list[torch.Tensor] = []
    rows.register_hook(gradients.append)
    padded = net.second(net.norm(rows.relu())).split([2, 3, 4])
    F.cross_entropy(torch.stack([own.sum(0) for own in padded]), Y[:3], reduction="sum").backward()
    gamma = opt.factors["first"].gamma
    torch.testing.assert_close(gamma.reshape(8, 8), gradients[0].T @ gradients[0] / len(rows))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_strided_nested_tensors_are_refused_with_what_to_do():
    compiled, opt = make_always_due(Nested())
    loss = compiled(torch.nested.nested_tensor(ROWS)).sum()
    loss.backward()
    with pytest.raises(kfc_fx.CaptureError, match=r"strided NestedTensor.*torch\.optim"):
        opt.step()


# -- complex layers ------------------------------------------------------------------------


class Spectrum(nn.Module):
    """A real layer, a filter of its Fourier transform, a complex layer, a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.filter = nn.Linear(4, 8), nn.Parameter(torch.randn(5, dtype=torch.cfloat))
        self.mixed, self.last = nn.Linear(5, 5, dtype=torch.cfloat), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.mixed(torch.fft.rfft(self.first(x)) * self.filter).abs())


@pytest.mark.parametrize("scaling", ["adam", "spectral", "eigen", "inverse"])
@pytest.mark.parametrize("options", [{}, {"average": 4.0}, {"generic": "sgd", "weight_decay": 0.1}])
def test_complex_layers_are_generic_with_the_reason_and_train(scaling, options):
    torch.manual_seed(0)
    compiled, opt = make_always_due(Spectrum(), scaling=scaling, lr=0.003, **options)
    losses = [step(compiled, opt) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert [block.name for block in compiled.kfc.plan.blocks] == ["first", "last"]
    reasons = {generic.name: generic.reason for generic in compiled.kfc.plan.generic}
    assert reasons["mixed.weight"] == "its weight is complex, and factors are of real layers"
    assert set(reasons) == {"filter", "mixed.weight", "mixed.bias"}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_complex_parameters_step_as_by_adamw(weight_decay):
    torch.manual_seed(0)
    net = Spectrum()
    reference = copy.deepcopy(net)
    held = ("filter", "mixed.weight", "mixed.bias")
    compiled = kfc_fx.compile(net)
    still = [p for n, p in net.named_parameters() if n not in held]
    moved = [p for n, p in net.named_parameters() if n in held]
    groups = [{"params": still, "lr": 0.0}, {"params": moved, "lr": 0.02}]
    opt = kfc_fx.KFC(groups, model=compiled, weight_decay=weight_decay)
    others = [p for n, p in reference.named_parameters() if n in held]
    adamw = torch.optim.AdamW(others, lr=0.02, weight_decay=weight_decay)
    for _ in range(6):
        step(compiled, opt)
        step(reference, adamw)
        for own, expected in zip(moved, others, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)
        reference.zero_grad()


def test_a_resumed_run_with_complex_parameters_is_bit_equal():
    def run(steps: int, state: tuple | None = None):
        torch.manual_seed(0)
        compiled, opt = make_always_due(Spectrum())
        if state is not None:
            compiled.load_state_dict(state[0])
            opt.load_state_dict(state[1])
        for _ in range(steps):
            step(compiled, opt)
        return compiled, opt

    half = run(3)
    state = copy.deepcopy((half[0].state_dict(), half[1].state_dict()))
    for own, expected in zip(run(3, state)[0].parameters(), run(6)[0].parameters(), strict=True):
        assert torch.equal(own, expected)


# -- buffers -------------------------------------------------------------------------------


class Registering(nn.Module):
    """A buffer that the forward pass registers, and one that it replaces by a longer one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("kept", torch.zeros(0, 8), persistent=False)

    def forward(self, x):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(8), persistent=False)
        h = self.first(x) * self.scale
        self.kept = torch.cat([self.kept, h.detach().mean(0, keepdim=True)])
        return self.second(h + self.kept.mean(0))


def test_buffers_that_come_and_grow_train_as_uncompiled():
    torch.manual_seed(0)
    net = Registering()
    reference = copy.deepcopy(net)
    compiled, opt = make_always_due(net, lr=0.0)
    for count in range(1, 13):
        expected = reference(X)
        loss = F.cross_entropy(compiled(X), Y)
        loss.backward()
        opt.step()
        assert torch.equal(loss, F.cross_entropy(expected, Y))
        assert len(net.kept) == count
    assert opt.diagnostics.statistics_steps == 12
    assert len(compiled.kfc.plan.blocks) == 2


def test_tracing_and_initializing_leave_such_buffers_as_they_were():
    torch.manual_seed(0)
    compiled, opt = make_always_due(Registering(), likelihood="categorical")
    compiled.kfc.trace(X)
    opt.initialize([X])
    assert dict(compiled.named_buffers()).keys() == {"kept"}
    assert len(compiled.kept) == 0
    assert "scale" not in compiled._non_persistent_buffers_set
    step(compiled, opt)
    assert len(compiled.kept) == 1


# -- sparse tensors --------------------------------------------------------------------------


class OnGraph(nn.Module):
    """Two layers on the nodes of a graph, whose edges are a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        hidden = torch.sparse.mm(edges, self.first(x)).tanh()
        return torch.sparse.mm(edges, self.second(hidden))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_factors_of_a_graph_with_sparse_edges_are_those_with_dense_ones(layout):
    generator = torch.Generator().manual_seed(0)
    edges = (torch.rand(20, 20, generator=generator) < 0.2).double()
    x, labels = torch.randn(20, 6, generator=generator).double(), torch.arange(20) % 3

    def factors(given: torch.Tensor):
        net = kfc_fx.compile(OnGraph().double())
        opt = kfc_fx.KFC(net, statistics=kfc_fx.Statistics(samples=None))
        F.cross_entropy(net(x, given), labels).backward()
        opt.step()
        return opt.factors

    found = factors(edges.to_sparse() if layout == "coo" else edges.to_sparse_csr())
    for name, expected in factors(edges).items():
        torch.testing.assert_close(found[name].omega, expected.omega)
        torch.testing.assert_close(found[name].gamma, expected.gamma)


def test_a_layer_with_a_sparse_input_is_generic_and_says_why():
    net = kfc_fx.compile(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    opt = kfc_fx.KFC(net)
    before = net[0].weight.detach().clone()
    F.cross_entropy(net(torch.randn(9, 6).to_sparse()), torch.arange(9) % 3).backward()
    opt.step()
    assert not torch.equal(net[0].weight, before)
    (reason,) = {g.reason for g in net.kfc.plan.generic if g.name == "0.weight"}
    assert "sparse" in reason
    assert [block.name for block in net.kfc.plan.blocks] == ["2"]


class Products(nn.Module):
    """Products with parameters on the nodes of a graph, whose features are a matrix too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(6, 8).double())
        self.second = nn.Parameter(torch.randn(8, 3).double())

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        hidden = torch.spmm(edges, torch.mm(x, self.first)).tanh()
        return torch.spmm(edges, torch.mm(hidden, self.second))


def test_products_in_a_frame_with_sparse_inputs_have_blocks_at_any_size():
    torch.manual_seed(1)
    net, dense = kfc_fx.compile(Products()), kfc_fx.compile(Products())
    statistics = kfc_fx.Statistics(every=1, samples=None)
    opt, other = (kfc_fx.KFC(model, lr=0.0, statistics=statistics) for model in (net, dense))
    for nodes in (20, 24, 30, 22):
        edges = (torch.rand(nodes, nodes) < 0.2).double()
        x, labels = torch.randn(nodes, 6).double(), torch.arange(nodes) % 3
        F.cross_entropy(net(x.to_sparse(), edges.to_sparse()), labels).backward()
        F.cross_entropy(dense(x, edges), labels).backward()
        opt.step()
        other.step()
    assert [block.name for block in net.kfc.plan.blocks] == ["second"]
    assert [g.name for g in net.kfc.plan.generic if "sparse" in g.reason] == ["first"]
    torch.testing.assert_close(opt.factors["second"].omega, other.factors["second"].omega)
    torch.testing.assert_close(opt.factors["second"].gamma, other.factors["second"].gamma)


# -- functions of the user's -----------------------------------------------------------------


class Sign(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binarized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x):
        return self.second(Sign.apply(self.first(x)))


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_a_function_of_the_users_runs_by_every_backend(fisher):
    def trained(backend: str) -> list[torch.Tensor]:
        net = kfc_fx.compile(Binarized(), backend=backend)
        statistics = kfc_fx.Statistics(fisher=fisher, samples=None)
        opt = kfc_fx.KFC(net, seed=0, statistics=statistics)
        F.cross_entropy(net(X), Y).backward()
        opt.step()
        assert {block.name for block in net.kfc.plan.blocks} == {"first", "second"}
        return [opt.factors[name].gamma for name in ("first", "second")]

    generator = torch.Generator().manual_seed(0)
    X, Y = torch.randn(16, 6, generator=generator), torch.arange(16) % 3
    expected = trained("eager")
    for backend in ("aot_eager", "inductor"):
        with pytest.warns(kfc_fx.KfcWarning, match="is run op by op"):
            torch.testing.assert_close(trained(backend), expected)
