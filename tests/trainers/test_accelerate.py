"""accelerate: ``prepare`` in any order, mixed precision, accumulation, clipping, checkpoints, ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kfc_fx
from tests.distributed.launch import run_ranks
from tests.trainers.needed import assert_same, by_hand, loader, needed, network

accelerate = needed("accelerate")

ORDERS = ("together", "model first", "model before compile", "optimizer first")


def prepared(order: str = "together", **options: Any) -> tuple[Any, ...]:
    """An accelerator, and what it has prepared in some order."""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    net = network()
    if order == "model before compile":
        net = kfc_fx.compile(accelerator.prepare(net))
        opt, data = accelerator.prepare(kfc_fx.KFC(net), loader())
        return accelerator, net, opt, data
    net = kfc_fx.compile(net)
    if order == "together":
        return accelerator, *accelerator.prepare(net, kfc_fx.KFC(net), loader())
    if order == "model first":
        net = accelerator.prepare(net)
        return accelerator, net, *accelerator.prepare(kfc_fx.KFC(net), loader())
    opt = accelerator.prepare(kfc_fx.KFC(net))
    return accelerator, accelerator.prepare(net), opt, accelerator.prepare(loader())


def train(accelerator, net, opt, data, *, epochs: int = 2, clip: float | None = None) -> float:
    loss = torch.zeros(())
    for _ in range(epochs):
        for x, y in data:
            with accelerator.accumulate(net):
                loss = F.cross_entropy(net(x), y)
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), clip)
                opt.step()
                opt.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("order", ORDERS)
def test_prepare_in_any_order(order):
    accelerator, net, opt, data = prepared(order)
    train(accelerator, net, opt, data)
    assert_same(net.parameters(), by_hand())


def test_accumulation_and_clipping():
    accelerator, net, opt, data = prepared(gradient_accumulation_steps=2)
    train(accelerator, net, opt, data, clip=0.5)
    assert_same(net.parameters(), by_hand(accumulate=2, clip=0.5))
    assert opt.optimizer.diagnostics.steps == 4


@pytest.mark.parametrize("order", ["together", "model before compile"])
def test_mixed_precision(order):
    accelerator, net, opt, data = prepared(order, mixed_precision="bf16")
    first = train(accelerator, net, opt, data, epochs=1)
    assert train(accelerator, net, opt, data, epochs=3) < first - 0.3
    plan = accelerator.unwrap_model(net).kfc.plan
    assert [block.name for block in plan.blocks] == ["0", "3"]


def test_a_state_is_saved_and_loaded(tmp_path):
    accelerator, net, opt, data = prepared()
    train(accelerator, net, opt, data)
    accelerator.save_state(str(tmp_path))
    train(accelerator, net, opt, data)
    other, again, its, same = prepared()
    other.load_state(str(tmp_path))
    train(other, again, its, same)
    assert_same(net.parameters(), again.parameters())


def test_two_ranks():
    printed = run_ranks("tests.trainers.accelerate_ranks", 2)
    assert printed.count("equal on both ranks") == len(ORDERS)
