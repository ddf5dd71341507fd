"""How a training run goes, as a JSON file that ``kfc-fx inspect --view run`` shows.

One entry for each time that it is written, and the spectra of all factors as they are then.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.engine.factors import Factors
from kfc_fx.errors import KfcError
from kfc_fx.optim.diagnostics import Diagnostics

VERSION = 1
MOST_EIGENVALUES = 64
IMAGE_SIDE = 32


@dataclass(frozen=True)
class Progress:
    """What of the diagnostics was reported before: steps and seconds by part."""

    steps: int
    seconds: Mapping[str, float]


def append_entry(
    path: Path,
    diagnostics: Diagnostics,
    before: Progress,
    factors: Mapping[str, Factors],
    *,
    lr: float,
    loss: float | Tensor | None,
) -> Progress:
    """Add an entry to the report at ``path``, which is made if there is none.

    Returns:
        What has been reported now.

    Raises:
        KfcError: the file there is no report.
    """
    report = _read(path)
    steps = max(1, diagnostics.steps - before.steps)
    seconds = {
        part: (total - before.seconds.get(part, 0.0)) / steps
        for part, total in diagnostics.seconds.items()
    }
    report["steps"].append(
        {
            "step": diagnostics.steps,
            "loss": _finite(loss),
            "lr": lr,
            "damping": diagnostics.damping,
            "nu": _finite(diagnostics.nu),
            "clip_scale": _finite(diagnostics.clip_scale),
            "seconds": seconds,
        }
    )
    report["factors"] = {name: factor_summary(factor) for name, factor in factors.items()}
    # A process that is killed here leaves the report as it was.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(report, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
    return Progress(diagnostics.steps, dict(diagnostics.seconds))


def factor_summary(factors: Factors) -> dict[str, Any]:
    """Spectra of Ω and Γ, largest first, what follows from them, and Ω as a small image.

    Of a separable Ω the spectrum is that of the Kronecker product; of a grouped layer it is that
    of all groups together. A block without Γ has no entries for it.
    """
    described = _described("omega", _input_spectrum(factors))
    if factors.output is not None:
        described |= _described("gamma", _spectrum(factors.output))
    return {**described, "omega_image": _image(factors)}


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"version": VERSION, "steps": [], "factors": {}}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["version"] == VERSION:
            return report
    except (ValueError, KeyError, TypeError) as error:
        raise KfcError(f"{path} is there already and is no report of a run: {error}") from error
    raise KfcError(f"{path} is a report of version {report['version']}, not {VERSION}")


def _finite(value: float | Tensor | None) -> float | None:
    """JSON has no other numbers."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


def _spectrum(factor: Tensor) -> Tensor:
    """Eigenvalues of ``[groups, D, D]``, or of a diagonal factor."""
    factor = factor.detach().double().cpu()
    diagonal = factor.shape[1] != factor.shape[2]
    return factor.flatten() if diagonal else torch.linalg.eigvalsh(factor).flatten()


def _input_spectrum(factors: Factors) -> Tensor:
    if factors.dense is not None:
        return _spectrum(factors.dense)
    assert factors.channel is not None
    assert factors.offset is not None
    channel, offset = (_spectrum(f[:1]) for f in (factors.channel, factors.offset))
    return torch.outer(channel, offset).flatten() / channel.sum().clamp(min=1e-300)


def _described(name: str, spectrum: Tensor) -> dict[str, Any]:
    values = spectrum.clamp(min=0).sort(descending=True).values
    share = values / values.sum().clamp(min=1e-300)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    largest = float(values[0])
    floor = largest * torch.finfo(torch.float32).eps  # smaller ones are rounding
    picked = torch.linspace(0, len(values) - 1, min(len(values), MOST_EIGENVALUES)).round().long()
    return {
        f"{name}_spectrum": values[picked].tolist(),
        f"{name}_condition": largest / max(float(values[-1]), floor) if largest else None,
        f"{name}_effective_rank": float(entropy.exp()) if largest else 0.0,
    }


def _image(factors: Factors) -> list[list[float]]:
    """Magnitudes of Ω (of the channel factor of a separable one), averaged to a few pixels."""
    factor = factors.dense if factors.dense is not None else factors.channel
    assert factor is not None
    picture = factor[:1].detach().float().abs().cpu()
    if picture.shape[1] != picture.shape[2]:
        return []
    if picture.shape[1] > IMAGE_SIDE:
        picture = F.adaptive_avg_pool2d(picture, IMAGE_SIDE)
    return picture[0].tolist()
