"""What ranks send each other holds all that there is: of every kind of layer, form and scaling."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.packing import counts_of, digits_of
from kfc_fx.distributed.statistics import summed_over_ranks
from kfc_fx.engine.state import refreshed_entries
from kfc_fx.engine.step_inputs import refresh_arguments
from kfc_fx.optim.rates import option_numbers


class Kinds(nn.Module):
    """Layers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.line = nn.Conv1d(8, 6, 3)
        self.grouped = nn.Conv1d(6, 6, 3, groups=3, bias=False)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.wide = nn.Linear(16, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, tokens):
        x = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mT
        x = torch.relu(self.up(torch.relu(self.grouped(torch.relu(self.line(x))))))
        return self.head(torch.relu(self.wide(x.flatten(1))))


class TwoAlike:
    """Two ranks with the same statistics."""

    def add(self, buffer):
        return buffer + buffer


OPTIONS = [
    {"scaling": "adam"},
    {"scaling": "adam", "statistics": {"refresh_every": 3}},
    {"scaling": "adam", "statistics": {"basis_limit": 8}},
    {"scaling": "spectral"},
    {"scaling": "eigen", "statistics": {"input_factor": "separable"}},
    {"scaling": "inverse"},
    {"scaling": "inverse", "statistics": {"input_factor": "separable"}},
    {"scaling": "adam", "blocks": {"head": "inverse", "line": "spectral", "wide": "eigen"}},
]


def armed(scaling, statistics=(), blocks=None):
    torch.manual_seed(0)
    net = kfc_fx.compile(Kinds().double())
    chosen = kfc_fx.Statistics(
        **{"every": 1, "refresh_every": 1, "samples": None, **dict(statistics)}
    )
    opt = kfc_fx.KFC(net, scaling=scaling, blocks=blocks, statistics=chosen)
    tokens = torch.arange(30).reshape(5, 6) * 3 % 7
    for step in range(2):
        opt.zero_grad()
        F.cross_entropy(net(tokens), torch.arange(5) % 3).backward()
        if step == 0:
            opt.step()
    return opt, opt._engine, opt._models[0].collector.sums


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sums_of_two_ranks_are_twice_those_of_one(options):
    _, engine, sums = armed(**options)
    assert len(sums.blocks) >= 5
    ranks = TwoAlike()
    both = summed_over_ranks(sums, engine.spec, ranks, Attempt(ranks))
    assert both.examples == 2 * sums.examples == 10
    held = {block.name: stack for stack in engine.spec.stacks for block in stack.blocks}
    assert both.blocks.keys() == both.rows.keys() == held.keys()
    for name, stack in held.items():
        assert both.rows[name] == [2 * count for count in sums.rows[name]]
        assert both.blocks[name].keys() == stack.factor_shapes.keys()
        for factor, value in both.blocks[name].items():
            torch.testing.assert_close(value, 2 * sums.blocks[name][factor], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_a_refresh_changes_is_what_its_owner_sends(options):
    opt, engine, _ = armed(**options)
    opt._models[0].use_statistics(engine)  # the factors are there
    for stack in engine.spec.stacks:
        engine.state[stack.key] |= {
            name: torch.eye(shape[-1]).double().expand(shape).clone()
            for name, shape in stack.factor_shapes.items()
            if name not in engine.state[stack.key]
        }
    numbers = option_numbers(engine.spec, opt.options)
    given = refresh_arguments(engine.program, engine.state, numbers, first=False)
    found = engine.program.functions["refresh"](**given)
    for stack in engine.spec.stacks:
        assert found[stack.key][0].keys() == refreshed_entries(engine.spec, stack).keys()


def test_parts_of_a_refresh_are_those_of_the_whole():
    for options in OPTIONS:
        opt, engine, sums = armed(**options)
        own = opt._models[0]
        keys = [stack.key for stack in engine.spec.stacks]
        own._accumulate(engine, sums, 1, keys, may_lack=False)
        numbers = option_numbers(engine.spec, opt.options)
        names = [block.name for block in engine.blocks]
        parts = [engine.refreshed_blocks(chosen, numbers) for chosen in (names[::2], names[1::2])]
        assert engine.refreshed_blocks([], numbers) == ({}, [])
        engine.refresh(numbers)
        whole = engine.held().blocks
        for blocks, failed in parts:
            assert not failed
            for name, entries in blocks.items():
                for entry, value in entries.items():
                    torch.testing.assert_close(value, whole[name][entry], rtol=1e-6, atol=1e-8)


def test_counts_are_exact_over_many_ranks():
    counts = [0, 1, 4095, 4096, 123_456_789, 2**35]
    total = sum(digits_of(counts).float() for _ in range(512))
    assert counts_of(total) == [512 * count for count in counts]
