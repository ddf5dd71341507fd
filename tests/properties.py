"""What must hold of the rewrite of any network. Hypothesis and ``make fuzz`` call these."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.capture.canonicalise import canonicalise
from kfc_fx.capture.graph import copy_graph
from kfc_fx.plan.forms import factor_forms
from kfc_fx.statistics.collector import Collector
from kfc_fx.statistics.request import StatisticsRequest
from tests.oracle import layer_patches, output_rows
from tests.strategies import CLASSES, DrawnNetwork

EXAMPLES = 4
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def labels(count: int = EXAMPLES) -> Tensor:
    """Classes, the same for every network."""
    return torch.arange(count) % CLASSES


def armed(net: nn.Module) -> tuple[nn.Module, Collector]:
    """A compiled network whose forward passes take statistics of the true targets, and what sums
    these."""
    compiled = kfc_fx.compile(net)
    request = StatisticsRequest(lambda block: factor_forms(block, "dense"), fisher="empirical")
    collector = compiled.kfc.attach(request)
    collector.arm()
    return compiled, collector


def loss_of(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Forward pass under a fixed seed, and the loss."""
    torch.manual_seed(5)
    return F.cross_entropy(model(x), y, reduction=reduction)


def results_stay_the_same(drawn: DrawnNetwork) -> None:
    """Loss, gradients, buffers and random numbers of a step with statistics, bit for bit."""
    x, seen = drawn.example(EXAMPLES), []
    for wrap in (lambda net: (net, None), armed):
        net = drawn.build()
        model, _collector = wrap(net)
        loss = loss_of(model, x, labels())
        number = torch.rand(1)
        loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        seen.append((loss, number, gradients, dict(net.named_buffers())))
    (loss, number, gradients, buffers), (own, own_number, found, own_buffers) = seen
    assert torch.equal(loss, own)
    assert torch.equal(number, own_number)
    for name, expected in {**gradients, **buffers}.items():
        value = {**found, **own_buffers}[name]
        assert (value is None) == (expected is None), name
        assert value is None or torch.equal(value, expected), name


def factors_equal_the_oracle(drawn: DrawnNetwork) -> None:
    """The statistics of every layer module, against a loop over examples."""
    net, x = drawn.build(), drawn.example(EXAMPLES)
    compiled, collector = armed(copy.deepcopy(net))
    loss_of(compiled, x, labels()).backward()
    statistics = collector.sums
    assert statistics.examples == EXAMPLES
    expected = _sums_by_hooks(net, x)
    for name, (omega, gamma, rows) in expected.items():
        found = statistics.blocks[name]
        block = compiled.kfc.plan.block(name)
        if found["omega"].shape != omega.shape:  # the diagonal of an embedding's
            omega = omega.diagonal(dim1=1, dim2=2).unsqueeze(1)
        torch.testing.assert_close(found["omega"], omega, msg=lambda m, n=name: f"{n} Ω: {m}")
        torch.testing.assert_close(found["gamma"], gamma, msg=lambda m, n=name: f"{n} Γ: {m}")
        assert statistics.rows[name] == [rows] * block.groups
    for name, found in statistics.blocks.items():
        for statistic, value in found.items():
            _check_positive(value, f"{name} {statistic}")


def _sums_by_hooks(net: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor, int]]:
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def keep(name: str, layer: nn.Module):
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            calls.append((name, layer, args[0].detach().clone(), out))
            return out.clone()  # an in-place activation may follow

        return hook

    inside = [n for n, m in net.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for name, layer in net.named_modules():
        if isinstance(layer, LAYERS) and not any(name.startswith(f"{n}.") for n in inside):
            layer.register_forward_hook(keep(name, layer))
    torch.manual_seed(5)
    output = net(x)
    onehot = F.one_hot(labels(), CLASSES).to(output.dtype)
    outs = [out for *_, out in calls]
    gradients = torch.autograd.grad(output, outs, output.detach().softmax(-1) - onehot)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for (name, layer, inputs, _), g in zip(calls, gradients, strict=True):
        omega, gamma, rows = sums.get(name, (0, 0, 0))
        for n in range(len(inputs)):
            patches = layer_patches(layer, inputs[n])
            per_row = output_rows(layer, inputs[n], g[n])
            omega = omega + patches.mT @ patches
            gamma = gamma + per_row.mT @ per_row
            rows += per_row.shape[1]
        sums[name] = (omega, gamma, rows)
    return sums


def _check_positive(value: Tensor, what: str) -> None:
    assert value.isfinite().all(), what
    if value.shape[-1] != value.shape[-2]:
        assert (value >= 0).all(), what
        return
    torch.testing.assert_close(value, value.mT, msg=f"{what} is not symmetric")
    lowest = torch.linalg.eigvalsh(value).min()
    assert lowest >= -1e-9 * (1 + value.abs().max()), what


def batches_add_up(drawn: DrawnNetwork) -> None:
    """Statistics of two halves of a batch are those of the whole."""
    net, x, y = drawn.build(), drawn.example(EXAMPLES), labels()
    (whole, sums), (halves, added) = armed(net), armed(copy.deepcopy(net))
    loss_of(whole, x, y, "sum").backward()
    for part in (slice(0, 1), slice(1, None)):
        loss_of(halves, x[part], y[part], "sum").backward()
    for name, expected in sums.sums.blocks.items():
        found = added.sums.blocks[name]
        for statistic, value in expected.items():
            torch.testing.assert_close(found[statistic], value)
    assert added.sums.rows == sums.sums.rows


def the_compiler_is_reproducible(drawn: DrawnNetwork) -> None:
    """Passes are idempotent; plan, stages and generated source are the same every time."""
    net, x = drawn.build(), drawn.example(EXAMPLES)
    first, second = kfc_fx.compile(net), kfc_fx.compile(copy.deepcopy(net))
    plan = first.kfc.trace(x)
    assert plan == second.kfc.trace(x)
    assert pickle.loads(pickle.dumps(plan)) == plan
    for own, other in zip(first.kfc.graphs, second.kfc.graphs, strict=True):
        assert [stage.name for stage in own.stages] == [stage.name for stage in other.stages]
        assert [stage.code for stage in own.stages] == [stage.code for stage in other.stages]
        assert not canonicalise(copy_graph(own.stage("canonical")))
    sources = []
    for compiled in (first, second):
        opt = kfc_fx.KFC(compiled, lr=0.01, seed=0)
        loss_of(compiled, x, labels()).backward()
        opt.step()
        sources.append(opt.update_source)
    assert sources[0] == sources[1]
    assert list(first.state_dict()) == list(net.state_dict())
    for own, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(own, other)
        assert own.isfinite().all()


def front_ends_agree(drawn: DrawnNetwork) -> None:
    """The plan by symbolic tracing is that by dynamo, wherever the former can follow.

    It keeps attention modules and padding modes other than zeros closed, as calls of modules.
    """
    net, x = drawn.build(), drawn.example(EXAMPLES)
    by_dynamo = kfc_fx.compile(copy.deepcopy(net)).kfc.trace(x)
    compiled = kfc_fx.compile(net)
    try:
        symbolic = compiled.kfc.trace_symbolic(x)
    except kfc_fx.CaptureError:
        return
    nodes = compiled.kfc.graphs[0].stage("captured").graph.nodes
    called = [n.args[0] for n in nodes if n.target is torch.func.functional_call]
    closed = [type(net.get_submodule(str(module.target))) for module in called]
    if closed:
        known = (nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        assert all(issubclass(kind, known) for kind in closed), closed
        return
    assert symbolic.blocks == by_dynamo.blocks
    assert [g.name for g in symbolic.generic] == [g.name for g in by_dynamo.generic]
    assert symbolic.frozen == by_dynamo.frozen


PROPERTIES = (
    front_ends_agree,
    results_stay_the_same,
    factors_equal_the_oracle,
    the_compiler_is_reproducible,
    batches_add_up,
)
