"""The convolution inputs that the kernel benchmark measures: distinct layers of known networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from kfc_fx.kernels.geometry import ConvGeometry, conv_geometry


@dataclass(frozen=True)
class ConvShape:
    """One distinct convolution: the shape of its input ``[N, C, *spatial]`` and its geometry."""

    network: str
    input_shape: tuple[int, ...]
    geometry: ConvGeometry

    @property
    def label(self) -> str:
        """Batch, channels, map, kernel, stride and groups in a few characters."""
        images, channels, *spatial = self.input_shape
        geometry = self.geometry
        text = f"N{images} C{channels} {_short(spatial)} k{_short(geometry.kernel_size)}"
        if set(geometry.stride) != {1}:
            text += f" s{_short(geometry.stride)}"
        if set(geometry.dilation) != {1}:
            text += f" d{_short(geometry.dilation)}"
        return text + (f" g{geometry.groups}" if geometry.groups > 1 else "")

    @property
    def locations(self) -> int:
        """Number of output locations, |T|."""
        return prod(self.geometry.output_size(self.input_shape[2:]))


def _short(sizes: tuple[int, ...] | list[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))


@dataclass(frozen=True)
class Network:
    """A network, by the batch and image size at which its layers are taken."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    side: int


def _resnet18_for_32_pixels() -> nn.Module:
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name)

    return build


def _kfc_cifar() -> nn.Module:
    """The convolutions of the CIFAR-10 network of Grosse & Martens 2016, section 5."""
    pool = nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), pool,
        nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(), pool,
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), pool,
    )  # fmt: skip


def networks(device: str) -> list[Network]:
    """The networks of the benchmark; a GPU takes the larger ones at a larger batch."""
    large = 8 if device == "cpu" else 64
    return [
        Network("ResNet-18", _resnet18_for_32_pixels, 128, 32),
        Network("ResNet-50", _torchvision("resnet50"), large, 224),
        Network("VGG-16", _torchvision("vgg16"), large, 224),
        Network("MobileNetV2", _torchvision("mobilenet_v2"), large, 224),
        Network("ConvNeXt-T", _torchvision("convnext_tiny"), large, 224),
        Network("KFC CIFAR-10", _kfc_cifar, 128, 32),
    ]


def layer_shapes(network: Network) -> list[ConvShape]:
    """Every distinct convolution that the network applies, in order, found on the meta device."""
    found: dict[ConvShape, None] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        geometry = conv_geometry(
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
        )
        found[ConvShape(network.name, tuple(arguments[0].shape), geometry)] = None

    with torch.device("meta"), torch.no_grad():
        model = network.build().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(note)
        model(torch.empty(network.batch, 3, network.side, network.side))
    return list(found)


def small_maps(batch: int) -> list[ConvShape]:
    """Maps of 7², 4² and 2² pixels, where borders are most of the work."""
    geometry = conv_geometry((3, 3), padding=1)
    return [
        ConvShape("small maps", (batch, channels, side, side), geometry)
        for side in (7, 4, 2)
        for channels in (64, 256, 512)
    ]


def benchmark_shapes(device: str) -> list[ConvShape]:
    """All shapes; a layer that several networks have is kept once, under the first."""
    shapes = [shape for network in networks(device) for shape in layer_shapes(network)]
    shapes += small_maps(32)
    distinct = {(shape.input_shape, shape.geometry): shape for shape in reversed(shapes)}
    return list(reversed(distinct.values()))


def quick_shapes(device: str) -> list[ConvShape]:
    """A few shapes of every kind, measured in about a minute."""
    batch = 8 if device == "cpu" else 64
    cases = [
        ((32, 64, 32, 32), 3, 1, 1), ((32, 128, 16, 16), 3, 1, 1), ((batch, 64, 56, 56), 3, 1, 1),
        ((batch, 3, 224, 224), 7, 2, 1), ((batch, 128, 56, 56), 3, 2, 1),
        ((batch, 256, 14, 14), 1, 1, 1), ((batch, 144, 56, 56), 3, 1, 144),
        ((batch, 96, 56, 56), 7, 1, 96), ((64, 32, 16, 16), 5, 1, 1),
        ((batch, 512, 7, 7), 3, 1, 1), ((32, 512, 4, 4), 3, 1, 1), ((32, 64, 2, 2), 3, 1, 1),
    ]  # fmt: skip
    return [
        ConvShape(
            "quick",
            shape,
            conv_geometry((k, k), stride=stride, padding=k // 2, groups=groups),
        )
        for shape, k, stride, groups in cases
    ]
