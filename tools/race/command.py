"""``kfc-fx bench train``: KFC against the optimizers in use, in steps and in seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kfc_fx.tools.data import sets as data_sets
from kfc_fx.tools.failures import (
    CommandError,
    import_extra,
    one_line_failures,
    unknown_name,
    writable,
)
from kfc_fx.tools.race import tasks as race_tasks
from kfc_fx.tools.race.costs import measure_costs
from kfc_fx.tools.race.optimizers import (
    CENTRES,
    ENTRANTS,
    KFC_PREFIX,
    PUBLISHED,
    SHORTENED,
    check_entrants,
    check_installed,
    title,
)
from kfc_fx.tools.race.processes import Workers, workers
from kfc_fx.tools.race.report import write_report
from kfc_fx.tools.race.results import ResultsFile, RunResult, RunSpec
from kfc_fx.tools.race.run import device_name, use_huge_pages, use_tensor_cores
from kfc_fx.tools.race.search import Entry, SearchSpec, next_runs
from kfc_fx.tools.race.shortened import next_shortened
from kfc_fx.tools.race.standings import rival_ends
from kfc_fx.tools.race.tasks import TASKS, CellSpec, RaceData, TaskSpec, find_task
from kfc_fx.tools.terminal import output_console

INTERRUPTED_EXIT_CODE = 130
RESULTS = Path("benchmarks/train.json")
QUICK_RESULTS = Path("benchmarks/train-quick.json")
QUICK_SEARCH = SearchSpec(rates=2, widenings=0, seeds=1, shortened=False)
QUICK_SHARE = 2  # of a cell's steps
QUICK_TASKS = ("kfc-cifar", "autoencoder", "gpt")
DEFAULT_CENTRE = 0.01


@dataclass(frozen=True)
class RaceSettings:
    """The checked choices of one ``kfc-fx bench train``."""

    cells: tuple[tuple[TaskSpec, CellSpec], ...]
    optimizers: tuple[str, ...]
    data_dir: Path
    search: SearchSpec
    workers: int
    threads: int
    cost_rounds: int
    device: torch.device
    whole_data: bool

    def load(self, task: TaskSpec) -> RaceData:
        """The data of a task."""
        return race_tasks.load(task.data, self.data_dir, whole=self.whole_data)

    def entries(self) -> Iterator[Entry]:
        """Every optimizer in every cell, the cells in the order of their weight."""
        for task, cell in self.cells:
            for name in cell.of(self.optimizers):
                yield entry_of(task, cell, name)


def train(
    data_dir: Annotated[
        Path, typer.Option(help="Folder of the data; tasks without data there are skipped.")
    ] = data_sets.DEFAULT_FOLDER,
    tasks: Annotated[
        str, typer.Option(help=f"Of {', '.join(TASKS)}, separated by commas; by default all.")
    ] = "",
    batch_sizes: Annotated[
        str, typer.Option(help="Of the tasks' own, separated by commas; by default all.")
    ] = "",
    optimizers: Annotated[
        str, typer.Option(help=f"Of {', '.join(ENTRANTS)}, separated by commas; by default all.")
    ] = "",
    rates: Annotated[
        int | None, typer.Option(min=2, help="Learning rates that each grid begins with.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of the best rate; of kfc-eigen and kfc-inverse one."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help=f"File of all runs, {RESULTS} by default; one that is there is gone on with."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A short one: three tasks, one batch size, two rates, one seed; without "
            "kfc-eigen and kfc-inverse.",
        ),
    ] = False,
    length: Annotated[int, typer.Option(min=1, help="Times the steps of every task.")] = 1,
    whole_data: Annotated[
        bool, typer.Option("--whole-data", help="Train on whole data sets, for longer runs.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda for one GPU.")] = "cpu",
    costs_only: Annotated[
        bool, typer.Option("--costs-only", help="Measure only what a step costs; train nothing.")
    ] = False,
    no_costs: Annotated[bool, typer.Option("--no-costs", help="Measure no step costs.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Draw tables and plots from the file alone.")
    ] = False,
    worker_count: Annotated[
        int | None, typer.Option("--workers", min=1, help="Runs at a time; by default one a core.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each run.")] = 1,
    cost_rounds: Annotated[int, typer.Option(min=2, help="Turns that step costs take.")] = 2,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Tune every optimizer alike on every task, then compare steps, seconds, memory.

    Each gets the same grid of learning rates around its own centre, widened where the best is
    at an edge, and two more seeds of the best (kfc-eigen and kfc-inverse none). Every run is kept
    as it ends: stop by Ctrl-C, start again, and it goes on. Seconds are compared by step costs,
    which all optimizers of a cell measure in turns; --costs-only repeats that on a quiet machine.
    """
    with one_line_failures(debug=debug):
        import_extra("matplotlib.figure", "the report")
        path = results or (QUICK_RESULTS if quick else RESULTS)
        if report and not path.is_file():
            raise CommandError(f"--report: no file {path} (name it by --results)")
        file = ResultsFile(path)
        console = output_console()
        if not report:
            names = chosen_optimizers(optimizers, quick=quick)
            check_entrants(names)
            place = _device(device)
            chosen = [
                (task, replace(cell, steps=cell.steps * length))
                for task, cell in chosen_cells(tasks, batch_sizes, quick=quick)
            ]
            cells = tuple(_with_data(chosen, data_dir, console))
            check_installed(names)
            settings = RaceSettings(
                cells=cells,
                optimizers=names,
                data_dir=data_dir,
                search=_search(quick, rates, seeds),
                workers=worker_count or max(1, (os.cpu_count() or 1) // threads),
                threads=threads,
                cost_rounds=cost_rounds,
                device=place,
                whole_data=whole_data,
            )
            _check_same_data(settings, file)
            writable("--results", path)
            failures: list[str] = []
            use_huge_pages()
            try:
                if not costs_only:
                    failures = _runs(settings, file, console)
                if not no_costs:
                    _costs(settings, file, console, repeat=costs_only)
            except KeyboardInterrupt:
                console.print("interrupted: the same command goes on", style="yellow")
                raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
        write_report(file, console)
        if not report and failures:
            raise CommandError("; ".join(failures))


def chosen_optimizers(optimizers: str, *, quick: bool = False) -> tuple[str, ...]:
    """Those that the option names, or all; a short race leaves the published algorithms out."""
    left_out = PUBLISHED if quick else ()
    return _names(optimizers) or tuple(name for name in ENTRANTS if name not in left_out)


def chosen_cells(
    tasks: str, batch_sizes: str, *, quick: bool = False
) -> list[tuple[TaskSpec, CellSpec]]:
    """The cells that the options name: first those that everyone takes part in.

    Raises:
        CommandError: an unknown task, or a batch size that none of the tasks has.
    """
    names = _names(tasks) or (QUICK_TASKS if quick else tuple(TASKS))
    chosen = [find_task(name) for name in names]
    sizes = _sizes(batch_sizes)
    known = sorted({cell.batch_size for task in chosen for cell in task.cells})
    if not sizes <= {*known}:
        raise CommandError(f"--batch-sizes {batch_sizes}: there are {', '.join(map(str, known))}")
    cells = [
        (task, _halved(cell) if quick else cell)
        for task in chosen
        for cell in task.cells
        if (cell.batch_size in sizes if sizes else cell.entrants is None or not quick)
    ]
    return sorted(cells, key=lambda cell: cell[1].entrants is not None)


def run_all(
    entries: Sequence[Entry], search: SearchSpec, file: ResultsFile, crew: Workers, console: Console
) -> list[str]:
    """Make every run that is missing, as many at a time as there are workers.

    Returns:
        One line for each run that failed; the others of its optimizer and cell are left out.
    """
    failures: list[str] = []
    left = list(entries)
    while True:
        due = _due(left, search, file, crew.active) or _due_shortened(
            left, search, file, crew.active
        )
        while due and not crew.full:
            spec = due.pop(0)
            crew.start(spec, find_task(spec.task))
        if not crew.active:
            return failures
        spec, result = crew.next_finished()
        if isinstance(result, RunResult):
            file.add_run(result)
            console.print(_line(result))
            continue
        failures.append(f"{_name(spec)} failed: {result}")
        console.print(failures[-1], style="red")
        left = [e for e in left if (e.cell, e.optimizer) != (spec.cell, spec.optimizer)]


def _due(
    entries: Sequence[Entry], search: SearchSpec, file: ResultsFile, active: set[RunSpec]
) -> list[RunSpec]:
    return [spec for entry in entries for spec in _left(entry, search, file) if spec not in active]


def _left(entry: Entry, search: SearchSpec, file: ResultsFile) -> list[RunSpec]:
    """The runs of a search that can be made now or are on their way."""
    return next_runs(entry, CENTRES.get(entry.optimizer, DEFAULT_CENTRE), search, file.runs)


def _due_shortened(
    entries: Sequence[Entry], search: SearchSpec, file: ResultsFile, active: set[RunSpec]
) -> list[RunSpec]:
    """In cells where every search is over: best rates and targets are known."""
    unfinished = {entry.cell for entry in entries if _left(entry, search, file)}
    found = []
    for entry in entries:
        if search.shortened and entry.optimizer in SHORTENED and entry.cell not in unfinished:
            targets = list(rival_ends(file, entry.cell).values())
            found += next_shortened(entry, targets, search, file.runs)
    return [spec for spec in found if spec not in active]


def entry_of(task: TaskSpec, cell: CellSpec, optimizer: str) -> Entry:
    """What an optimizer does in a cell."""
    fewer = cell.kfc_fewer if optimizer.startswith(KFC_PREFIX) else 1
    steps, whole = cell.steps // fewer, None if fewer == 1 else cell.steps
    seeds = 1 if optimizer in PUBLISHED else cell.seeds
    return Entry(task.name, cell.batch_size, steps, optimizer, whole, seeds, cell.finer)


def _runs(settings: RaceSettings, file: ResultsFile, console: Console) -> list[str]:
    with workers(settings.workers, settings.threads, settings.load, settings.device) as crew:
        return run_all(list(settings.entries()), settings.search, file, crew, console)


def _costs(settings: RaceSettings, file: ResultsFile, console: Console, *, repeat: bool) -> None:
    known = {(cost.task, cost.batch_size, cost.optimizer) for cost in file.costs}
    torch.set_num_threads(settings.workers * settings.threads)  # nothing runs beside it
    use_tensor_cores(settings.device)
    for task, cell in settings.cells:
        names = cell.of(settings.optimizers)
        if not cell.costs:
            continue
        if not repeat and all((task.name, cell.batch_size, name) in known for name in names):
            continue
        data = settings.load(task).to(settings.device)
        costs = measure_costs(task, cell.batch_size, names, data, settings.cost_rounds)
        file.add_costs(costs)
        shown = ", ".join(f"{title(cost.optimizer)} {cost.mean:.2f}" for cost in costs)
        console.print(f"{task.name} {cell.batch_size}: steps in SGD steps: {shown}")


def _with_data(
    cells: Sequence[tuple[TaskSpec, CellSpec]], folder: Path, console: Console
) -> Iterator[tuple[TaskSpec, CellSpec]]:
    """The cells whose data is there; the others are named.

    Raises:
        CommandError: there is no data for any.
    """
    missing: dict[str, str] = {}
    for task in {task.name: task for task, _ in cells}.values():
        try:
            race_tasks.load(task.data, folder)
        except CommandError as error:
            missing[task.name] = str(error)
            console.print(f"{task.name} is skipped: {error}", style="yellow")
    if len(missing) == len({task.name for task, _ in cells}):
        raise CommandError(f"no task has its data: {'; '.join(dict.fromkeys(missing.values()))}")
    yield from (cell for cell in cells if cell[0].name not in missing)


def _device(name: str) -> torch.device:
    """The device of all runs.

    Raises:
        CommandError: there is no such device.
    """
    if name not in ("cpu", "cuda"):
        raise unknown_name("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch.cuda.is_available() is false")
    return torch.device(name)


def _check_same_data(settings: RaceSettings, file: ResultsFile) -> None:
    """Raise :class:`CommandError` where the file holds runs on other data or another device:
    they would stand in one table."""
    device = device_name(settings.device)
    for task in dict.fromkeys(task for task, _ in settings.cells):
        size = len(settings.load(task).train)
        for run in file.runs.values():
            if run.spec.task == task.name and (run.train_size, run.device) != (size, device):
                raise CommandError(
                    f"--results {file.path} has runs of {task.name} on {run.train_size} examples "
                    f"and {run.device}, not {size} and {device}: name another file"
                )


def _search(quick: bool, rates: int | None, seeds: int | None) -> SearchSpec:
    search = QUICK_SEARCH if quick else SearchSpec()
    return replace(search, rates=rates or search.rates, seeds=seeds or search.seeds)


def _halved(cell: CellSpec) -> CellSpec:
    return replace(cell, steps=cell.steps // QUICK_SHARE)


def _names(option: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in option.split(",") if name.strip()))


def _sizes(option: str) -> set[int]:
    try:
        return {int(size) for size in _names(option)}
    except ValueError:
        raise CommandError(f"--batch-sizes {option!r}: write them as 128,512") from None


def _line(result: RunResult) -> str:
    spec = result.spec
    end = "diverged" if result.diverged else f"loss {result.final_loss:.4g}"
    accuracy = "" if result.test_accuracy is None else f", accuracy {result.test_accuracy:.1%}"
    return f"{_name(spec)}: {end}{accuracy}, {result.seconds:.0f} s"


def _name(spec: RunSpec) -> str:
    return (
        f"{spec.task} {spec.batch_size}: {title(spec.optimizer)}, {spec.steps} steps, "
        f"rate {spec.lr:g}, seed {spec.seed}"
    )
