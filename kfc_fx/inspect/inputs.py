"""Example inputs: as given in text, or guessed from a model's conventions."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kfc_fx.errors import TargetError, did_you_mean
from kfc_fx.inspect.quiet import without_logs
from kfc_fx.inspect.target import Subject

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "bool")
}
SIDES: dict[int, tuple[int, ...]] = {
    1: (64, 128, 256, 1024, 16, 8),
    2: (32, 28, 64, 224, 299, 16, 8, 6),
    3: (16, 32, 8, 64),
}
"""Sizes of a map to try on a model without a convention, by spatial dimensions."""
SEED = 0


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one input."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        suffix = "" if self.dtype == "float32" else f":{self.dtype}"
        return "x".join(map(str, self.shape)) + suffix

    def example(self) -> Tensor:
        """Normal noise under a fixed seed; zeros and ones of a dtype that is not floating."""
        dtype = DTYPES[self.dtype]
        generator = torch.Generator().manual_seed(SEED)
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(dtype)
        return torch.randint(2, self.shape, generator=generator).to(dtype)


def parse_input(text: str) -> InputSpec:
    """``1x3x224x224`` or ``1x16:int64``.

    Raises:
        TargetError: no such shape, or an unknown dtype.
    """
    sizes, _, dtype = text.partition(":")
    dtype = dtype or "float32"
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise TargetError(
            f"--input {text}: unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}; there are: "
            f"{known}"
        )
    parts = sizes.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise TargetError(
            f"--input {text}: a shape is sizes joined by x, as in 1x3x224x224 or 1x16:int64"
        )
    return InputSpec(tuple(map(int, parts)), dtype)


def describe(tensors: Sequence[Tensor]) -> tuple[InputSpec, ...]:
    """The specs of tensors."""
    return tuple(InputSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors)


def guess_inputs(subject: Subject) -> tuple[InputSpec, ...]:
    """Inputs of a model that follows a convention.

    torchvision's builders name the crop of their weights, timm's models their input size; of
    others the first layer names its channels or features, and for a convolution the usual sizes
    of a map are tried, on fake tensors, until the model takes one.

    Raises:
        TargetError: nothing could be guessed; the message names ``--input``.
    """
    if subject.example_inputs is not None:
        return describe(subject.example_inputs)
    found = _torchvision_size(subject) or _timm_size(subject.model)
    if found is not None:
        return (found,)
    tried = [spec for spec in _first_layer_sizes(subject.model) if _takes(subject.model, spec)]
    if tried:
        return (tried[0],)
    raise TargetError(
        f"the inputs of {subject.target} cannot be guessed: give their shapes, as in "
        "--input 1x3x224x224, once for each input"
    )


def _torchvision_size(subject: Subject) -> InputSpec | None:
    if not subject.module_name.startswith("torchvision.models"):
        return None
    models = importlib.import_module("torchvision.models")
    try:
        weights = models.get_model_weights(subject.attribute)
    except ValueError:  # not a registered builder
        return None
    transform = weights.DEFAULT.transforms()
    crop = getattr(transform, "crop_size", None)
    if type(transform).__name__ == "ImageClassification" and crop:
        return InputSpec((1, 3, crop[0], crop[0]))
    return None


def _timm_size(model: nn.Module) -> InputSpec | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return InputSpec((1, *size)) if size else None


def _first_layer_sizes(model: nn.Module) -> Iterator[InputSpec]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield InputSpec((1, 16), "int64")
            return
        if isinstance(module, nn.Linear):
            yield InputSpec((1, module.in_features))
            return
        if isinstance(module, nn.modules.conv._ConvNd):
            axes = len(module.kernel_size)
            yield from (InputSpec((1, module.in_channels, *(s,) * axes)) for s in SIDES[axes])
            return


def _takes(model: nn.Module, spec: InputSpec) -> bool:
    """Whether the model runs on such an input, tried without computing anything."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with without_logs(), mode, torch.no_grad():
        fakes: dict[str, Tensor] = {
            name: mode.from_tensor(tensor) for name, tensor in state.items()
        }
        example = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        try:
            torch.func.functional_call(model, fakes, (example,))
        except Exception:  # whatever a model raises on an input that it does not take
            return False
    return True
