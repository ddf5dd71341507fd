"""Compiled backends give what eager gives, to rounding."""

from __future__ import annotations

import pytest
import torch

import kfc_fx
from tests.models import (
    IMAGES,
    LABELS,
    backward,
    collector_of,
    count_calls_of_emitting_graphs,
    count_compiled_emitting_graphs,
    parameters,
    token_network,
)
from tests.options import kfc

SIZES = (12, 7, 5)
"""Batch of each step: two with statistics, then a plain one."""


def run(backend: str) -> dict[str, object]:
    net = token_network(dropout=0.0).double()
    compiled = kfc_fx.compile(net, backend=backend)
    options = {"fisher": "empirical", "scaling": "inverse", "clip": None, "samples": None}
    opt = kfc(compiled, lr=0.01, **options)
    outputs, gradients, sums, armed = [], [], [], []
    for step, size in enumerate(SIZES):
        if step == 2:
            collector_of(compiled).arm(False)
        armed.append(collector_of(compiled).armed)
        outputs.append(backward(compiled, IMAGES[:size].double(), LABELS[:size]).detach())
        gradients.append([p.grad.clone() for p in net.parameters()])
        sums.append({name: dict(s) for name, s in collector_of(compiled).sums.blocks.items()})
        if step < 2:
            opt.step()
        opt.zero_grad()
    assert armed == [True, True, False]
    factors = {name: (f.omega, f.gamma) for name, f in opt.factors.items()}
    return {
        "outputs": outputs,
        "gradients": gradients,
        "sums": sums,
        "factors": factors,
        "parameters": parameters(net),
        "buffers": [b.clone() for b in net.buffers()],
        "graphs": len(compiled.kfc.graphs),
    }


@pytest.fixture(scope="module")
def eager() -> dict[str, object]:
    return run("eager")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_statistics_and_steps_equal_those_of_eager(backend, eager):
    found = run(backend)
    assert set(eager["factors"]) == {"conv", "norm", "grouped", "tokens", "head"}
    assert eager["sums"][2] == {}
    for what, expected in eager.items():
        torch.testing.assert_close(found[what], expected, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_evaluation_and_gradients_alternate(backend):
    net, reference = token_network(dropout=0.0).double(), token_network(dropout=0.0).double()
    compiled = kfc_fx.compile(net, backend=backend)
    _opt = kfc_fx.KFC(compiled, lr=0.1)
    x = IMAGES.double()
    for _ in range(2):
        compiled.eval()
        reference.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), reference(x))
        compiled.train()
        reference.train()
        torch.testing.assert_close(backward(compiled, x), backward(reference, x))


def test_a_compiled_graph_is_not_retained_by_the_user_on_a_curvature_step():
    """A limit of AOTAutograd: a graph compiled to be retained by the Fisher pass says that it is
    not, when the user retains it too. The error is torch's and names retain_graph."""
    compiled = kfc_fx.compile(token_network(dropout=0.0).double(), backend="aot_eager")
    _opt = kfc(compiled, lr=0.1, fisher="empirical", samples=None)
    loss = torch.nn.functional.cross_entropy(compiled(IMAGES.double()), LABELS)
    with pytest.raises(RuntimeError, match="retain_graph=False"):
        loss.backward(retain_graph=True)


SHARES = [
    ("inductor", {"samples": 4}),
    ("aot_eager", {"samples": 4, "fisher": "sampled"}),
    ("aot_eager", {"samples": "auto", "factor": 8}),
    ("aot_eager", {"samples": "auto", "factor": 16, "fisher": "sampled"}),
]


@pytest.mark.parametrize(("backend", "options"), SHARES, ids=str)
def test_a_share_of_the_batch_is_that_of_eager(backend, options, monkeypatch):
    """Of batches of three sizes: a graph is compiled for two of them, and the third runs op by
    op."""
    options = {"fisher": "empirical", "scaling": "inverse", "every": 1, **options}
    factor = options.pop("factor", 1)
    compiled_graphs = count_compiled_emitting_graphs(monkeypatch)
    found = []
    for own in ("eager", backend):
        net = token_network(dropout=0.0).double()
        compiled = kfc_fx.compile(net, backend=own)
        opt = kfc(compiled, lr=0.01, seed=0, **options)
        graphs, sums = len(compiled_graphs), []
        for size in (12, 8, 12, 6, 12):
            x = IMAGES[:size].double().repeat(factor, 1, 1, 1)
            backward(compiled, x, LABELS[:size].repeat(factor))
            sums.append({n: dict(s) for n, s in collector_of(compiled).sums.blocks.items()})
            opt.step()
            opt.zero_grad()
        found.append((sums, parameters(net)))
        assert len(compiled_graphs) - graphs == (1 if own == "eager" else 2)
    (whole, expected), (own_sums, own_parameters) = found
    assert {"conv", "norm", "grouped", "tokens", "head"} <= whole[0].keys()
    torch.testing.assert_close(own_sums, whole)
    torch.testing.assert_close(own_parameters, expected)


def test_a_block_that_is_not_due_when_a_graph_is_compiled_is_due_later(monkeypatch):
    """Of "spectral", whose statistics are taken in the forward pass."""
    calls = count_calls_of_emitting_graphs(monkeypatch)
    found = []
    for backend in ("eager", "aot_eager"):
        net = token_network(dropout=0.0).double()
        compiled = kfc_fx.compile(net, backend=backend)
        _opt = kfc(compiled, lr=0.01, scaling="spectral", samples=4, every=1)
        collector, sums = collector_of(compiled), []
        for left_out in ({"conv", "head"}, set(), {"tokens"}):
            collector.arm(True, left_out=left_out)
            backward(compiled, IMAGES.double(), LABELS)
            sums.append({name: dict(s) for name, s in collector.take().blocks.items()})
        assert "head" not in sums[0]
        assert "head" in sums[1]
        assert "tokens" in sums[1].keys() - sums[2].keys()
        found.append(sums)
    torch.testing.assert_close(found[1], found[0])
    assert len(calls) == 6


def test_code_of_another_share_is_not_taken_from_a_cache():
    """Shares and blocks that are not due are in no graph that a cache may know code by."""

    def sums(backend: str, samples: int | None, scaling: str) -> dict[str, dict]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 5))
        compiled = kfc_fx.compile(net, backend=backend)
        _opt = kfc(compiled, lr=0.01, seed=0, scaling=scaling, samples=samples, every=1)
        backward(compiled, IMAGES[:12].flatten(1)[:, :2].contiguous(), LABELS[:12])
        return {name: dict(s) for name, s in collector_of(compiled).sums.blocks.items()}

    for scaling in ("adam", "spectral"):
        known = []
        for samples in (4, 6, None):
            expected = sums("eager", samples, scaling)
            torch.testing.assert_close(sums("inductor", samples, scaling), expected)
            known.append(expected["0"]["omega"])
        assert not torch.allclose(known[0], known[1])
        assert not torch.allclose(known[1], known[2])
