"""The README's picture, from the race's results: ``python docs/picture.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from race_tables import NAMES, cells_of, standing_of  # noqa: E402 - from the folder above

STEPS = 42
SHOWN = {
    "sgd": ("SGD", "#8c8c8c", 1.2),
    "adamw": ("AdamW", "#c49a00", 1.2),
    "muon": ("Muon", "#2f7fd6", 1.2),
    "soap": ("SOAP", "#3a9d5d", 1.2),
    "kfc-adam": ("KFC", "#d62f4b", 2.2),
}
INK = "#7f7f7f"  # legible on white and on black


def picture(path: Path) -> None:
    """Draw training loss by step, a panel for each task in which all took part."""
    mpl.rcParams.update({"svg.hashsalt": "kfc_fx", "svg.fonttype": "none", "font.size": 9})
    raced = [cell for cell in cells_of("train") if all(standing_of(cell, n) for n in SHOWN)]
    figure = Figure((9.5, 2.4), layout="constrained")
    for axes, cell in zip(figure.subplots(1, len(raced)), raced, strict=True):
        for name, (_, colour, width) in SHOWN.items():
            standing = standing_of(cell, name)
            assert standing is not None
            curve = [float(f"{loss:.3g}") for loss in standing.curve]
            axes.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=width)
        axes.set_yscale("log")
        axes.set_title(NAMES.get(cell.task, cell.task), color=INK)
        axes.set_xlabel("step", color=INK)
        axes.set_yticks([])
        axes.set_yticks([], minor=True)
        axes.set_xticks([1, STEPS])
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.patch.set_alpha(0)
    figure.axes[0].set_ylabel("training loss, log", color=INK)
    labels = [label for label, _, _ in SHOWN.values()]
    legend = figure.legend(
        figure.axes[0].lines, labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    for text in legend.get_texts():
        text.set_color(INK)
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    picture(HERE / "pictures" / "race.svg")
