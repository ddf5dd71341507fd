"""Architectures of transformers, from small configurations with random weights.

Each is there twice: called without labels, and with them, when the loss is computed inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from kfc_fx.tools.zoo.architecture import Architecture
from kfc_fx.tools.zoo.case import ModelCase, ZooEntry
from kfc_fx.tools.zoo.transformers_media import MEDIA_ARCHITECTURES
from kfc_fx.tools.zoo.transformers_text import TEXT_ARCHITECTURES

BATCH, TOKENS, CLASSES, VOCABULARY = 2, 12, 3, 99
Tensors = dict[str, Any]


@dataclass(frozen=True)
class _Call:
    """Arguments of one call, and those that make it compute its loss."""

    inputs: Tensors
    labels: Tensors


def entries() -> Iterator[ZooEntry]:
    """Two entries per architecture; one where it has no loss of its own."""
    for architecture in (*TEXT_ARCHITECTURES, *MEDIA_ARCHITECTURES):
        for labels in (False, True):
            if labels and not _CALLS[architecture.call](architecture).labels:
                continue
            name = architecture.model + ("+labels" if labels else "")
            build = partial(_case, architecture, labels)
            yield ZooEntry("transformers", architecture.family, name, build)


def _case(architecture: Architecture, labels: bool) -> ModelCase:
    config = getattr(transformers, architecture.config)(**architecture.options)
    model = getattr(transformers, architecture.model)(config).train()
    call = _CALLS[architecture.call](architecture)
    arguments = {**call.inputs, **(call.labels if labels else {})}
    return ModelCase(
        model, (), arguments, likelihood=architecture.likelihood, size=_described(config)
    )


def _described(config: Any) -> str:
    """Layers and width of a configuration, as far as it states them."""
    layers = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    parts = [
        f"{layers} layers" if layers else "",
        f"width {width}" if isinstance(width, int) else "",
    ]
    return ", ".join(part for part in parts if part) or "small configuration"


# -- arguments of the calls ----------------------------------------------------------------


def _tokens(length: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def _language_model(_: Architecture) -> _Call:
    tokens = _tokens()
    return _Call({"input_ids": tokens}, {"labels": tokens})


def _token_classes(_: Architecture) -> _Call:
    labels = torch.randint(CLASSES, (BATCH,))
    inputs = {"input_ids": _tokens(), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}
    return _Call(inputs, {"labels": labels})


def _sequence_to_sequence(_: Architecture) -> _Call:
    target = _tokens(7)
    return _Call({"input_ids": _tokens(), "decoder_input_ids": target}, {"labels": target})


def _image_classes(architecture: Architecture) -> _Call:
    side = architecture.image
    return _Call(
        {"pixel_values": torch.randn(BATCH, 3, side, side)},
        {"labels": torch.randint(CLASSES, (BATCH,))},
    )


def _image_segments(architecture: Architecture) -> _Call:
    side = architecture.image
    return _Call(
        {"pixel_values": torch.randn(BATCH, 3, side, side)},
        {"labels": torch.randint(CLASSES, (BATCH, side, side))},
    )


def _image_boxes(architecture: Architecture) -> _Call:
    side = architecture.image
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.4], [0.4, 0.3, 0.2, 0.2]])
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": boxes} for _ in range(BATCH)]
    return _Call({"pixel_values": torch.randn(BATCH, 3, side, side)}, {"labels": labels})


def _masked_image(architecture: Architecture) -> _Call:
    side = architecture.image
    return _Call({"pixel_values": torch.randn(BATCH, 3, side, side)}, {})


def _image_and_text(architecture: Architecture) -> _Call:
    side = architecture.image
    inputs = {"input_ids": _tokens(), "pixel_values": torch.randn(BATCH, 3, side, side)}
    return _Call(inputs, {"return_loss": True})


def _speech(_: Architecture) -> _Call:
    return _Call(
        {"input_values": torch.randn(BATCH, 1600)}, {"labels": torch.tensor([[3, 4], [5, 6]])}
    )


def _speech_to_text(_: Architecture) -> _Call:
    target = _tokens(7)
    inputs = {"input_features": torch.randn(BATCH, 20, 60), "decoder_input_ids": target}
    return _Call(inputs, {"labels": target})


def _spectrogram_classes(_: Architecture) -> _Call:
    labels = torch.randint(CLASSES, (BATCH,))
    return _Call({"input_values": torch.randn(BATCH, 32, 32)}, {"labels": labels})


_CALLS: dict[str, Callable[[Architecture], _Call]] = {
    "language_model": _language_model,
    "token_classes": _token_classes,
    "sequence_to_sequence": _sequence_to_sequence,
    "image_classes": _image_classes,
    "image_segments": _image_segments,
    "image_boxes": _image_boxes,
    "masked_image": _masked_image,
    "image_and_text": _image_and_text,
    "speech": _speech,
    "speech_to_text": _speech_to_text,
    "spectrogram_classes": _spectrogram_classes,
}
