"""The networks of ``kfc-fx train``, by name or as ``module:function`` or ``./file.py:Name``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from kfc_fx.errors import first_line
from kfc_fx.inspect.target import resolve_target
from kfc_fx.tools.failures import CommandError, import_extra, unknown_name

ImageShape = tuple[int, int, int]

AUTOENCODER_WIDTHS = (128, 64, 32, 8)
DEFAULT_NETWORKS = {
    "digits": "digits-net",
    "mnist": "lenet",
    "fashion-mnist": "lenet",
    "cifar10": "kfc-cifar",
}


def build(name: str, image_shape: ImageShape, classes: int) -> nn.Module:
    """A freshly initialized network that maps images to logits ``[N, classes]``, or of pixels.

    Args:
        name: one of :data:`NETWORKS`, or what names a model elsewhere (``resolve_target``):
            ``module:function`` or ``./file.py:Name``, called without arguments.
        image_shape: (C, H, W).
        classes: length of the output.

    Raises:
        CommandError: no such network, or it does not fit the images.
        TargetError: nothing elsewhere has that name, or it is no model.
    """
    if ":" in name:
        network = copy.deepcopy(resolve_target(name).model)  # it may name one that is there
    elif name in NETWORKS:
        network = NETWORKS[name](image_shape, classes)
    else:
        raise unknown_name("model", name, [*NETWORKS, "module:function", "./file.py:Name"])
    outputs = math.prod(image_shape) if name in AUTOENCODERS else classes
    _check_output(name, network, image_shape, outputs)
    return network


def digits_net(image_shape: ImageShape, classes: int) -> nn.Module:
    """Two 3x3 convolutions and a hidden layer, for images of 8x8."""
    _check_size("digits-net", image_shape, [8])
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def digits_autoencoder(image_shape: ImageShape, _: int) -> nn.Module:
    """64-128-64-32-8 and back, tanh, a linear code, for images of 8x8."""
    _check_size("digits-autoencoder", image_shape, [8])
    widths = (math.prod(image_shape), *AUTOENCODER_WIDTHS)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((*widths, *widths[-2::-1])):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    del layers[2 * len(widths) - 2], layers[-1]  # the code and the logits are linear
    return nn.Sequential(*layers)


def kfc_cifar(image_shape: ImageShape, classes: int) -> nn.Module:
    """The CIFAR-10 network of Grosse & Martens (2016), with maps of 15, 7 and 3."""
    _check_size("kfc-cifar", image_shape, [32], "its maps are 15, 7 and 3 there")
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(3, 2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, classes),
    )


def lenet(image_shape: ImageShape, classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max-pooling, for 28x28 (padded to 32x32) or 32x32 images."""
    _check_size("lenet", image_shape, [28, 32])
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 6, 5, padding=(32 - image_shape[1]) // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def resnet18(image_shape: ImageShape, classes: int) -> nn.Module:
    """torchvision's ResNet-18, its first layer made for the images' number of channels."""
    models = import_extra("torchvision.models", "the model 'resnet18'")
    network: nn.Module = models.resnet18(num_classes=classes)
    if image_shape[0] != 3:
        network.conv1 = nn.Conv2d(image_shape[0], 64, 7, stride=2, padding=3, bias=False)
    return network


NETWORKS: dict[str, Callable[[ImageShape, int], nn.Module]] = {
    "digits-net": digits_net,
    "digits-autoencoder": digits_autoencoder,
    "kfc-cifar": kfc_cifar,
    "lenet": lenet,
    "resnet18": resnet18,
}
AUTOENCODERS = ("digits-autoencoder",)
"""Those that return logits of the pixels, and no classes."""


def _check_size(name: str, image_shape: ImageShape, sizes: list[int], reason: str = "") -> None:
    _, height, width = image_shape
    if height != width or height not in sizes:
        wanted = " or ".join(f"{size}x{size}" for size in sizes)
        because = f" ({reason})" if reason else ""
        raise CommandError(f"{name} needs images of {wanted}{because}; these are {height}x{width}")


def _check_output(name: str, network: nn.Module, image_shape: ImageShape, classes: int) -> None:
    size = "x".join(map(str, image_shape))
    was_training = network.training
    network.eval()  # one example is too few for BatchNorm, and its statistics must not move
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, *image_shape))
    except RuntimeError as error:
        message = f"model {name} does not fit images of {size}: {first_line(error)}"
        raise CommandError(message) from error
    network.train(was_training)
    shape = tuple(getattr(output, "shape", ()))
    if shape != (1, classes):
        raise CommandError(
            f"model {name} returns shape {shape} for one image of {size}, "
            f"where (1, {classes}) is needed"
        )
