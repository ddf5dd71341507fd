"""A run's report as plots: how it went by step, where the time goes, the spectra of the factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("loss", "lr", "damping", "nu", "clip_scale")
PARTS = ("gradient", "statistics", "refresh", "update")
MOST_BLOCKS = 8


def run_figure(report: Mapping[str, Any]) -> Figure:
    """Draw a report as :meth:`kfc_fx.KFC.save_report` writes it.

    One panel for each series that has values, one for the share of time by part, and the spectra
    of Ω and Γ of the blocks with the worst conditioned Ω.
    """
    from matplotlib.figure import Figure

    steps = report["steps"]
    names = [name for name in SERIES if any(entry[name] is not None for entry in steps)]
    count = len(names) + 3
    figure = Figure(figsize=(5 * 2, 2.6 * ((count + 1) // 2)), layout="constrained")
    panels = figure.subplots((count + 1) // 2, 2, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _series(axes, steps, name)
    _times(panels[len(names)], steps)
    worst = _worst_conditioned(report["factors"])
    for offset, factor in enumerate(("omega", "gamma"), start=1):
        _spectra(panels[len(names) + offset], report["factors"], worst, factor)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure


def _series(axes: Axes, steps: Sequence[Mapping[str, Any]], name: str) -> None:
    known = [(entry["step"], entry[name]) for entry in steps if entry[name] is not None]
    axes.plot(*zip(*known, strict=True), marker=".")
    axes.set(title=name.replace("_", " "), xlabel="step")
    if name == "nu":
        axes.set_yscale("log")


def _times(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    at = [entry["step"] for entry in steps]
    seconds = [[entry["seconds"].get(part, 0.0) for entry in steps] for part in PARTS]
    axes.stackplot(at, seconds, labels=PARTS)
    axes.set(title="seconds a step", xlabel="step")
    axes.legend(loc="upper right", fontsize="x-small")


def _worst_conditioned(factors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    known = [name for name, factor in factors.items() if factor["omega_condition"] is not None]
    return sorted(known, key=lambda name: -factors[name]["omega_condition"])[:MOST_BLOCKS]


def _spectra(
    axes: Axes, factors: Mapping[str, Mapping[str, Any]], blocks: Sequence[str], factor: str
) -> None:
    for name in blocks:
        values = factors[name][f"{factor}_spectrum"]
        at = [index / max(1, len(values) - 1) for index in range(len(values))]
        axes.plot(at, values, label=name or "the model itself", linewidth=1)
    axes.set(title=f"spectrum of {factor}", xlabel="share of eigenvalues", yscale="log")
    if blocks:
        axes.legend(fontsize="xx-small")
