"""Tables and plots of ``kfc-fx bench train``, from its results files."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

from kfc_fx.tools.race.optimizers import ENTRANTS, SHORTENED, title
from kfc_fx.tools.race.report import heading, plot
from kfc_fx.tools.race.results import ResultsFile
from kfc_fx.tools.race.standings import Cell, Standing, ToTarget, cells

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = {"kfc-cifar": "the paper's net", "gpt": "GPT", "vit": "ViT", "resnet20": "ResNet-20"}
NOTHING = "–"


@cache
def cells_of(file: str) -> list[Cell]:
    """All cells of a results file.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    path = BENCHMARKS / f"{file}.json"
    if not path.exists():
        raise FileNotFoundError(path)
    return cells(ResultsFile(path))


def named(cell: Cell) -> str:
    """Task, batch size and steps."""
    return f"{NAMES.get(cell.task, cell.task)}, {cell.batch_size} ({cell.steps})"


def entrants(file: str) -> list[str]:
    """Those that took part: KFC, then the others in the order of the race."""
    found = {standing.optimizer for cell in cells_of(file) for standing in cell.standings}
    return sorted((n for n in ENTRANTS if n in found), key=lambda n: not n.startswith("kfc-"))


def standing_of(cell: Cell, name: str) -> Standing | None:
    """That of an optimizer, if it took part in the cell."""
    return next((s for s in cell.standings if s.optimizer == name), None)


def raced(file: str) -> list[Cell]:
    """The cells in which more than SGD and "adam" took part."""
    found = [cell for cell in cells_of(file) if len(cell.standings) > 2]
    if not found:
        raise ValueError(f"{file} has no cell of several optimizers")
    return found


def ends(file: str) -> list[list[str]]:
    """Final training losses; the lowest is bold."""
    names = entrants(file)
    rows = [["task, batch (steps)", *map(title, names)]]
    for cell in raced(file):
        finals = [standing_of(cell, name) for name in names]
        means = [s.final.mean if s and s.final else math.inf for s in finals]
        shown = [NOTHING if math.isinf(mean) else f"{mean:.4g}" for mean in means]
        lowest = min(means)
        rows.append(
            [
                named(cell),
                *(
                    f"**{text}**" if mean == lowest else text
                    for text, mean in zip(shown, means, strict=True)
                ),
            ]
        )
    return rows


def tests(file: str) -> list[list[str]]:
    """Test accuracies of the tasks that have classes."""
    names = entrants(file)
    rows = [["test accuracy", *map(title, names)]]
    for cell in raced(file):
        found = [standing_of(cell, name) for name in names]
        if any(s and s.test_accuracy for s in found):
            texts = [
                f"{100 * s.test_accuracy.mean:.1f} %" if s and s.test_accuracy else NOTHING
                for s in found
            ]
            rows.append([named(cell), *texts])
    return rows


def to_rivals(file: str) -> list[list[str]]:
    """Steps of "adam" to each rival's end: by its curve, and of the shortest run that ends so."""
    rivals = [name for name in entrants(file) if not name.startswith("kfc-")]
    rows = [['steps of "adam" to the end of', *map(title, rivals)]]
    for cell in raced(file):
        targets = {t.rival: t for t in _adam(cell).targets}
        rows.append([named(cell), *(_steps(targets.get(rival)) for rival in rivals)])
    return rows


def _adam(cell: Cell) -> Standing:
    (name,) = (name for name in SHORTENED if name == "kfc-adam")
    found = standing_of(cell, name)
    if found is None:
        raise ValueError(f"{named(cell)} has no run of {name}")
    return found


def _steps(target: ToTarget | None) -> str:
    if target is None or target.steps is None:
        return NOTHING
    return f"{target.steps} / {target.shortened}" if target.shortened else str(target.steps)


def costs(file: str) -> list[list[str]]:
    """Mean step of each optimizer in SGD steps; of KFC the mean of the first steps, too."""
    names = [name for name in entrants(file) if name != "sgd"]
    rows = [["mean step in SGD steps (the first ones)", *map(title, names)]]
    for cell in raced(file):
        texts = []
        for name in names:
            standing = standing_of(cell, name)
            cost = standing.cost if standing else None
            early = f" ({cost.early:.2f})" if cost and name.startswith("kfc-") else ""
            texts.append(f"{cost.mean:.2f}{early}" if cost else NOTHING)
        rows.append([named(cell), *texts])
    return rows


def times(file: str) -> list[list[str]]:
    """Time of the shortest run of "adam" over that of the rival's whole run."""
    rivals = [name for name in entrants(file) if not name.startswith("kfc-")]
    rows = [['time of the shortest run of "adam" over that of', *map(title, rivals)]]
    for cell in cells_of(file):
        targets = {t.rival: t for t in _adam(cell).targets}
        texts = []
        for rival in rivals:
            target, own = targets.get(rival), standing_of(cell, rival)
            if target and target.shortened_seconds and own and own.cost:
                ratio = target.shortened_seconds / own.cost.relative_seconds(cell.steps)
                texts.append(f"{ratio:.2f}")
            else:
                texts.append(NOTHING)
        if any(text != NOTHING for text in texts):
            rows.append([named(cell), *texts])
    return rows


def against_sgd(file: str) -> list[list[str]]:
    """Long runs of SGD, and the shortest of "adam" that ends as low."""
    rows = [["task, batch (steps)", "end of SGD", 'steps of "adam"', "times fewer"]]
    for cell in cells_of(file):
        if len(cell.standings) > 2:
            continue
        (target,) = (t for t in _adam(cell).targets if t.rival == "sgd")
        if target.shortened is None:
            raise ValueError(f'"adam" did not reach the end of SGD in {named(cell)}')
        fewer = cell.steps / target.shortened
        rows.append([named(cell), f"{target.loss:.4g}", str(target.shortened), f"{fewer:.3g}"])
    return rows


def draw(file: str, task: str, batch: int, steps: int, path: Path) -> str:
    """Write the plot of a cell, and return its heading."""
    key = (task, batch, steps)
    cell = next(c for c in cells_of(file) if (c.task, c.batch_size, c.steps) == key)
    plot(cell, path)
    return heading(cell)


TABLES = {
    "race-ends": ends,
    "race-tests": tests,
    "race-steps": to_rivals,
    "race-costs": costs,
    "race-times": times,
    "race-against-sgd": against_sgd,
}
