"""All models of torchvision, on the smallest images that they take, with batch 2."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import VisionTransformer

from kfc_fx.tools.zoo.case import ModelCase, ZooEntry, smallest_image_case
from kfc_fx.tools.zoo.detection import detection_case

IMAGES = (64, 96, 128, 160, 192, 224, 256, 299)
"""Sides that a classifier is tried on, in this order."""

CLASSES = 5
VIDEO_SHAPES = {
    "mvit": (3, 16, 224, 224),
    "s3d": (3, 16, 224, 224),
    "swin3d": (3, 4, 64, 64),
    "default": (3, 4, 32, 32),
}
WIDE_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "vit_l_16": {"patch_size": 16, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096},
    "vit_l_32": {"patch_size": 32, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096},
    "vit_h_14": {"patch_size": 14, "num_heads": 16, "hidden_dim": 1280, "mlp_dim": 5120},
}
"""Arguments of the vision transformers that are cut to a few of their equal layers."""

WIDE_LAYERS = 4


def entries() -> Iterator[ZooEntry]:
    """One entry per registered model."""
    for name in torchvision.models.list_models():
        family = _family(name)
        yield ZooEntry("torchvision", family, name, partial(_BUILDERS[family], name))


def _family(name: str) -> str:
    """The part of torchvision that a model belongs to."""
    module = torchvision.models.get_model_builder(name).__module__
    for family in ("detection", "segmentation", "video", "quantization", "optical_flow"):
        if f".{family}." in module:
            return family
    return "classification"


def _classification(name: str) -> ModelCase:
    if name in WIDE_TRANSFORMERS:
        return _wide_transformer(name)
    build = partial(_classifier, name)
    return smallest_image_case(build, IMAGES)


def _classifier(name: str, size: int) -> nn.Module:
    options: dict[str, Any] = {"weights": None}
    if name.startswith("vit_"):
        options["image_size"] = size
    if "inception" in name or "googlenet" in name:
        options["init_weights"] = True
    return torchvision.models.get_model(name, **options)


def _wide_transformer(name: str) -> ModelCase:
    options = WIDE_TRANSFORMERS[name]
    side = 2 * options["patch_size"]
    model = VisionTransformer(image_size=side, num_layers=WIDE_LAYERS, **options)
    images = torch.randn(2, 3, side, side)
    return ModelCase(model.train(), (images,), size=f"{side}x{side}, {WIDE_LAYERS} layers")


def _quantization(name: str) -> ModelCase:
    """The float model that is to be quantized later."""
    return smallest_image_case(lambda _: _quantizable(name), IMAGES)


def _quantizable(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, quantize=False)


def _segmentation(name: str) -> ModelCase:
    def build(_: int) -> nn.Module:
        options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
        if not name.startswith("lraspp"):
            options["aux_loss"] = True
        return torchvision.models.get_model(name, **options)

    return smallest_image_case(build, IMAGES)


def _video(name: str) -> ModelCase:
    shape = VIDEO_SHAPES[next((key for key in VIDEO_SHAPES if name.startswith(key)), "default")]
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    frames, side = shape[1], shape[2]
    return ModelCase(model.train(), (torch.randn(2, *shape),), size=f"{frames}x{side}x{side}")


def _optical_flow(name: str) -> ModelCase:
    model = torchvision.models.get_model(name, weights=None).train()
    images = (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128))
    options = {"num_flow_updates": 2}
    return ModelCase(model, images, options, likelihood="gaussian", size="128x128, 2 updates")


_BUILDERS = {
    "classification": _classification,
    "quantization": _quantization,
    "segmentation": _segmentation,
    "video": _video,
    "optical_flow": _optical_flow,
    "detection": detection_case,
}
