from __future__ import annotations

import pytest
import torch
from torch import nn

import kfc_fx
from kfc_fx.tools.failures import CommandError
from kfc_fx.tools.train.optimizers import (
    DIGITS_NET_RATES,
    LEARNING_RATES,
    OptimizerSpec,
    prepare,
    specify,
)


def test_names_keep_their_order_and_get_their_rates() -> None:
    chosen = specify("sgd, kfc,adamw", [], "inverse")
    assert chosen == (
        OptimizerSpec("sgd", LEARNING_RATES["sgd"]),
        OptimizerSpec("kfc", LEARNING_RATES["kfc inverse"], "inverse"),
        OptimizerSpec("adamw", LEARNING_RATES["adamw"]),
    )
    assert [spec.title for spec in chosen] == ["SGD Nesterov", "KFC (inverse)", "AdamW"]


def test_the_demo_s_network_has_rates_of_its_own() -> None:
    kfc, sgd = specify("kfc,sgd", ["kfc=0.5"], "adam", "digits-net")
    assert (kfc.lr, sgd.lr) == (0.5, DIGITS_NET_RATES["sgd"])


def test_learning_rates_are_overridden_one_by_one_or_together() -> None:
    chosen = specify("kfc,sgd,adamw", ["kfc=0.5,sgd = 1e-1", "adamw=2"], "adam")
    assert [spec.lr for spec in chosen] == [0.5, 0.1, 2.0]


@pytest.mark.parametrize(
    ("names", "rates", "scaling", "message"),
    [
        ("kfc,sdg", [], "adam", r"unknown optimizer 'sdg' \(did you mean 'sgd'\?\)"),
        ("sgd,sgd", [], "adam", "name each optimizer once"),
        (",", [], "adam", "name each optimizer once"),
        ("kfc", [], "adamw", r"unknown scaling 'adamw' \(did you mean 'adam'\?\)"),
        ("kfc", ["0.1"], "adam", "--lr '0.1': write it as kfc=0.01"),
        ("kfc", ["adam=0.1"], "adam", r"unknown optimizer in --lr 'adam' \(did you mean 'adamw'"),
        ("kfc", ["kfc=fast"], "adam", "'fast' is not a positive number"),
        ("kfc", ["kfc=-1"], "adam", "'-1' is not a positive number"),
        ("kfc", ["kfc=inf"], "adam", "'inf' is not a positive number"),
    ],
)
def test_wrong_choices(names: str, rates: list[str], scaling: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        specify(names, rates, scaling)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_peers_are_torch_s_own(name: str, kind: type) -> None:
    network = nn.Linear(2, 2)
    prepared = prepare(OptimizerSpec(name, 0.25), network, torch.zeros(1, 2))
    assert type(prepared.optimizer) is kind
    assert prepared.optimizer.param_groups[0]["lr"] == 0.25
    assert prepared.network is network
    assert prepared.capture_seconds == 0.0


def test_kfc_compiles_and_captures_first() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    prepared = prepare(OptimizerSpec("kfc", 0.25, "inverse"), network, torch.zeros(4, 2))
    assert isinstance(prepared.optimizer, kfc_fx.KFC)
    assert isinstance(prepared.network, nn.Module)
    assert len(prepared.network.kfc.graphs) > 0
    assert prepared.optimizer.param_groups[0]["lr"] == 0.25
    assert prepared.capture_seconds > 0
