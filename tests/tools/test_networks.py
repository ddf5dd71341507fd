from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kfc_fx.errors import TargetError
from kfc_fx.tools import failures
from kfc_fx.tools.data.networks import NETWORKS, build
from kfc_fx.tools.failures import CommandError

OWN_NETWORKS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))

def wrong_size():
    return nn.Sequential(nn.Flatten(), nn.Linear(63, 10))

def two_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

def with_argument(width):
    return nn.Linear(width, 10)

def no_network():
    return 3
"""


@pytest.fixture
def own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(OWN_NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["unrelated"])
    monkeypatch.delitem(__import__("sys").modules, "own_networks", raising=False)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits-net", (1, 8, 8)),
        ("kfc-cifar", (3, 32, 32)),
        ("lenet", (1, 28, 28)),
        ("lenet", (3, 32, 32)),
        ("resnet18", (3, 32, 32)),
        ("resnet18", (1, 28, 28)),
    ],
)
def test_output_shapes(name: str, shape: tuple[int, int, int]) -> None:
    network = build(name, shape, 10)
    assert network.training
    assert network(torch.randn(4, *shape)).shape == (4, 10)


def test_kfc_cifar_is_the_network_of_the_paper() -> None:
    network = build("kfc-cifar", (3, 32, 32), 10)
    maps, x = [], torch.randn(2, 3, 32, 32)
    for layer in network.children():
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            maps.append(tuple(x.shape[1:]))
    assert maps == [(32, 15, 15), (32, 7, 7), (64, 3, 3)]
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    assert [tuple(layer.weight.shape) for layer in convolutions] == [
        (32, 3, 5, 5),
        (32, 32, 5, 5),
        (64, 32, 5, 5),
    ]
    assert network[-1].weight.shape == (10, 576)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("kfc-cifar", (1, 28, 28), r"needs images of 32x32 \(its maps .*\); these are 28x28"),
        ("lenet", (1, 8, 8), "lenet needs images of 28x28 or 32x32; these are 8x8"),
        ("digits-net", (1, 8, 28), "digits-net needs images of 8x8; these are 8x28"),
        ("resnet19", (3, 32, 32), r"unknown model 'resnet19' \(did you mean 'resnet18'\?\)"),
    ],
)
def test_what_does_not_fit(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        build(name, shape, 10)


@pytest.mark.usefixtures("own_networks")
@pytest.mark.parametrize("name", ["own_networks:small", "./own_networks.py:small"])
def test_a_function_in_the_working_directory(name: str) -> None:
    network = build(name, (1, 8, 8), 10)
    assert network.training
    # The trial run must leave BatchNorm's statistics as they were.
    assert int(network[1].num_batches_tracked) == 0


@pytest.mark.usefixtures("own_networks")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_network:small", r"there is no module 'own_network' \(did you mean"),
        (":small", "':small' names no model"),
        ("own_networks:smal", r"has no 'smal' \(did you mean 'small'\?\)"),
        ("./own_networks.py:smal", r"has no 'smal' \(did you mean 'small'\?\)"),
        ("own_networks:wrong_size", "does not fit images of 1x8x8: mat1 and mat2"),
        ("own_networks:two_classes", r"returns shape \(1, 2\) .* where \(1, 10\) is needed"),
        ("own_networks:with_argument", "missing 1 required positional argument: 'width'$"),
        ("own_networks:no_network", "returned a int, not an nn.Module"),
    ],
)
def test_functions_that_do_not_serve(name: str, message: str) -> None:
    with pytest.raises((CommandError, TargetError), match=message):
        build(name, (1, 8, 8), 10)


def test_resnet18_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="torchvision")

    monkeypatch.setattr(failures.importlib, "import_module", missing)
    with pytest.raises(CommandError, match=r"torchvision, .* pip install 'kfc_fx\[demo\]'"):
        NETWORKS["resnet18"]((3, 32, 32), 10)
