"""The bytes that are counted before training, against what training holds."""

from __future__ import annotations

import functools
import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import kfc_fx
from kfc_fx.inspect.inputs import parse_input
from kfc_fx.inspect.inspection import inspect_model
from kfc_fx.inspect.memory import ALTERNATIVES, OWN, memory_of
from kfc_fx.inspect.peak import PeakCounter
from kfc_fx.inspect.quantities import bytes_text
from kfc_fx.optim.scalings.table import SCALINGS
from kfc_fx.tools.cli import app
from tests.inspect.small_networks import ConvNet, GroupedNet, TokenNet

IMAGES = {ConvNet: "8x2x6x6", GroupedNet: "8x4x8x8", TokenNet: "8x16:int64"}
WAYS = [*((name, {}) for name in SCALINGS), *ALTERNATIVES]


def counted(kind, dtype=torch.float32):
    model = kind().to(dtype)
    given = parse_input(IMAGES[kind])
    if dtype != torch.float32 and "int" not in given.dtype:
        given = replace(given, dtype=str(dtype).removeprefix("torch."))
    return memory_of(inspect_model(model, kind.__name__, [given]))


def batch(kind, dtype=torch.float32):
    given = parse_input(IMAGES[kind])
    if "int" in given.dtype:
        return torch.randint(11, given.shape)
    return torch.randn(given.shape, dtype=dtype)


def backward(model, kind, dtype=torch.float32):
    output = model(batch(kind, dtype))
    F.cross_entropy(output, torch.randint(output.shape[1], (len(output),))).backward()


def trained(kind, dtype=torch.float32, **options):
    model = kfc_fx.compile(kind().to(dtype))
    opt = kfc_fx.KFC(model, **options)
    backward(model, kind, dtype)
    opt.step()
    return opt


def held(*states):
    return sum(t.nbytes for state in states for entry in state.values() for t in entry.values())


@pytest.mark.parametrize(("scaling", "changed"), WAYS, ids=str)
@pytest.mark.parametrize("kind", IMAGES)
def test_state_is_what_an_optimizer_holds(kind, scaling, changed, memories):
    rows = iter(memories(kind).rows[2:])
    (row,) = (row for way, row in zip(WAYS, rows, strict=True) if way == (scaling, changed))
    own = {name: value for name, value in changed.items() if name in OWN}
    of_statistics = {name: value for name, value in changed.items() if name not in OWN}
    opt = trained(kind, scaling=scaling, statistics=kfc_fx.Statistics(**of_statistics), **own)
    assert row.state == held(opt._engine.state, opt._engine.generic)


@pytest.fixture(scope="module")
def memories():
    return functools.cache(counted)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", IMAGES)
def test_statistics_are_the_sums_that_a_backward_pass_leaves(kind, scaling, memories):
    (row,) = (r for r in memories(kind).rows if r.optimizer == f'KFC "{scaling}"' and not r.options)
    model = kfc_fx.compile(kind())
    opt = kfc_fx.KFC(model, scaling=scaling)
    backward(model, kind)
    sums = opt._models[0].collector.sums.blocks
    assert sums
    assert row.statistics == sum(s.nbytes for of_block in sums.values() for s in of_block.values())


@pytest.mark.parametrize(
    ("row", "make"),
    [
        (0, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (1, lambda p: torch.optim.AdamW(p)),
    ],
)
def test_torchs_optimizers(row, make, memories):
    model = GroupedNet()  # one of its parameters is frozen
    opt = make([p for p in model.parameters() if p.requires_grad])
    backward(model, GroupedNet)
    opt.step()
    found = memories(GroupedNet)
    assert found.rows[row].state == held(opt.state)
    assert found.parameters == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def test_half_precision_averages_and_master_weights():
    found = counted(ConvNet, torch.bfloat16)
    opt = trained(ConvNet, torch.bfloat16, average=10.0)
    assert found.rows[2].state == held(opt._engine.state, opt._engine.generic)
    assert found.average == sum(t.nbytes for t in opt._engine.average.values())
    opt = trained(ConvNet, torch.bfloat16, master_weights=True)
    copies = opt._engine.held().master_weights
    assert found.master_weights == sum(t.nbytes for t in copies.values()) > 0


def test_the_peak_of_calls():
    outside = torch.empty(10, device="meta")  # 40 bytes
    counter = PeakCounter()
    with counter:
        kept = outside + 1  # 40
        passing = torch.cat([kept, kept])  # 80 more
        view = passing[:5]
        del passing
        gc.collect()
        assert counter.held == 120  # the view keeps it
        del view
        gc.collect()
        assert counter.held == 40
        outside.add_(kept)  # makes nothing
        kept.mul_(2)
    assert (counter.held, counter.peak) == (40, 120)


def test_a_refresh_holds_at_least_what_takes_the_place_of_bases(memories):
    for row in memories(ConvNet).rows[2:]:
        assert row.refresh > row.statistics > 0
    sgd, adamw, *_ = memories(ConvNet).rows
    assert sgd.refresh == adamw.refresh == 0


def test_the_view_has_a_row_for_each():
    target = f"{Path(__file__).with_name('small_networks.py')}:ConvNet"
    arguments = ["inspect", target, "--input", IMAGES[ConvNet], "--memory"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for name in SCALINGS:
        assert f'KFC "{name}"' in result.stdout
    size = bytes_text(sum(p.nbytes for p in ConvNet().parameters()))
    assert f"parameters {size}, gradients {size}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torchvision.models:resnet18", "--memory", "--view", "plan"], "belongs to --view memory"),
        (["torch.nn:PReLU", "--input", "2x3", "--memory"], "no layer has a block"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
