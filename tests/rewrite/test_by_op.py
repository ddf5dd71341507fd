"""When graphs with statistics are compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.compilation import armed_pass
from kfc_fx.rewrite import emitting_graph
from tests.models import backward, make, token_network

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4


def made() -> tuple[nn.Module, kfc_fx.KFC]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    compiled = kfc_fx.compile(net, backend="aot_eager")
    return compiled, kfc_fx.KFC(compiled, seed=0, statistics=kfc_fx.Statistics(every=2))


def step(net: nn.Module, opt: kfc_fx.KFC) -> None:
    opt.zero_grad()
    F.cross_entropy(net(X), Y).backward()
    opt.step()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statistics that a compiled graph has taken."""
    taken: list[int] = []
    own = emitting_graph.compile_emitting

    def compile_emitting(backend, module):
        run = own(backend, module)
        return lambda *inputs: taken.append(1) or run(*inputs)

    monkeypatch.setattr(emitting_graph, "compile_emitting", compile_emitting)
    return taken


def test_the_first_statistics_are_taken_op_by_op(calls, monkeypatch):
    monkeypatch.setattr(armed_pass, "BY_OP", 5)
    net, opt = made()
    for number in range(30):
        step(net, opt)
        assert len(calls) == max(0, opt.diagnostics.statistics_steps - 5), number
    assert len(calls) > 5


def test_a_run_that_goes_on_compiles_where_the_other_would(calls, monkeypatch):
    monkeypatch.setattr(armed_pass, "BY_OP", 5)
    net, opt = made()
    while opt.diagnostics.statistics_steps < 4:
        step(net, opt)
    again, other = made()
    again.load_state_dict(net.state_dict())
    other.load_state_dict(opt.state_dict())
    for _ in range(12):
        step(net, opt)
    before = len(calls)
    for _ in range(12):
        step(again, other)
    assert len(calls) == 2 * before > 0
    for own, expected in zip(again.parameters(), net.parameters(), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_factors_and_steps_are_those_of_the_compiled_graph(fisher, monkeypatch):
    found = []
    for early in (0, 32):
        monkeypatch.setattr(armed_pass, "BY_OP", early)
        net, opt = make(token_network(), backend="aot_eager", fisher=fisher, every=2)
        for _ in range(4):
            backward(net)
            opt.step()
            opt.zero_grad()
        found.append((dict(opt.factors), [*net.parameters(), *net.buffers()]))
    (compiled, expected), (by_op, own) = found
    assert {"conv", "norm", "grouped", "tokens", "head"} <= compiled.keys() == by_op.keys()
    for name, factors in compiled.items():
        torch.testing.assert_close(by_op[name].gamma, factors.gamma, rtol=1e-4, atol=1e-6)
        if factors.dense is not None:
            torch.testing.assert_close(by_op[name].omega, factors.omega, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-5)
