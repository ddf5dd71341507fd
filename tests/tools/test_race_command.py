"""``kfc-fx bench train`` as a command: what it chooses, resumes, reports and refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_race_search import cost, result
from typer.testing import CliRunner

from kfc_fx.tools.cli import app
from kfc_fx.tools.race import command as race
from kfc_fx.tools.race.command import QUICK_SEARCH, chosen_cells, chosen_optimizers, run_all
from kfc_fx.tools.race.optimizers import CENTRES
from kfc_fx.tools.race.processes import workers
from kfc_fx.tools.race.results import ResultsFile, RunResult, RunSpec
from kfc_fx.tools.race.run import HUGE_PAGES
from kfc_fx.tools.race.search import Entry, SearchSpec
from kfc_fx.tools.race.tasks import TASKS, Examples, RaceData, TaskSpec

ENTRIES = [Entry("gpt", 128, 12, name) for name in ("sgd", "kfc-adam")]
QUIET = Console(quiet=True)


class Crew:
    """Two runs at a time, the last one started ends first; none is trained."""

    def __init__(self, answer: Callable[[RunSpec], RunResult | str]) -> None:
        self.answer = answer
        self.made: list[RunSpec] = []
        self.active: list[RunSpec] = []

    @property
    def full(self) -> bool:
        return len(self.active) == 2

    def start(self, spec: RunSpec, task: TaskSpec) -> None:
        assert task.name == spec.task
        assert not self.full
        self.active.append(spec)

    def next_finished(self) -> tuple[RunSpec, RunResult | str]:
        spec = self.active.pop()
        self.made.append(spec)
        return spec, self.answer(spec)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets in the environment of its processes does not outlive a test."""
    monkeypatch.setenv(HUGE_PAGES, "0")


def by_distance(spec: RunSpec) -> RunResult:
    """The nearer the rate is to the centre's upper neighbour, the lower the end."""
    return result(spec, 1 + abs(spec.lr - 1.7 * CENTRES[spec.optimizer]))


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code, and everything printed, its line breaks as spaces."""
    ended = CliRunner().invoke(app, ["bench", "train", *arguments])
    return ended.exit_code, " ".join(ended.output.split())


def test_a_race_that_was_stopped_makes_no_run_twice(tmp_path: Path) -> None:
    whole = Crew(by_distance)
    uninterrupted = ResultsFile(tmp_path / "whole.json")
    assert run_all(ENTRIES, SearchSpec(), uninterrupted, whole, QUIET) == []
    # All nine lengths end as low as SGD: four are tried, at two rates each; the shortest is repeated.
    assert len(whole.made) == len(set(whole.made)) == 2 * (4 + 2) + 2 * 4 + 2

    def stopping(spec: RunSpec) -> RunResult:
        if len(stopped.made) == 5:
            raise KeyboardInterrupt
        return by_distance(spec)

    stopped = Crew(stopping)
    with pytest.raises(KeyboardInterrupt):
        run_all(ENTRIES, SearchSpec(), ResultsFile(tmp_path / "part.json"), stopped, QUIET)
    resumed, file = Crew(by_distance), ResultsFile(tmp_path / "part.json")
    assert len(file.runs) == 4
    run_all(ENTRIES, SearchSpec(), file, resumed, QUIET)
    assert not set(resumed.made) & set(stopped.made[:4])
    assert set(file.runs) == set(uninterrupted.runs)
    idle = Crew(by_distance)
    run_all(ENTRIES, SearchSpec(), ResultsFile(tmp_path / "part.json"), idle, QUIET)
    assert idle.made == []


def test_runs_are_shortened_only_when_the_rates_of_their_cell_are_found(tmp_path: Path) -> None:
    entries = [
        Entry("gpt", 128, 15, "kfc-adam", cell_steps=60, seeds=1),
        Entry("gpt", 128, 60, "sgd", seeds=1),
    ]  # the crew keeps the first run, one of KFC's, to the last
    crew = Crew(by_distance)
    file = ResultsFile(tmp_path / "results.json")
    seen: list[tuple[int, int]] = []
    start = crew.start

    def noting(spec: RunSpec, task: TaskSpec) -> None:
        seen.append((spec.steps, len(file.runs)))
        start(spec, task)

    crew.start = noting  # type: ignore[method-assign]
    run_all(entries, SearchSpec(), file, crew, QUIET)
    shortened = [(steps, finished) for steps, finished in seen if steps < 15]
    assert shortened
    assert all(finished >= 8 for _, finished in shortened)  # four rates of each


def test_a_run_that_fails_ends_its_own_search_only(tmp_path: Path) -> None:
    crew = Crew(lambda spec: "no memory" if spec.optimizer == "sgd" else by_distance(spec))
    file = ResultsFile(tmp_path / "results.json")
    failures = run_all(ENTRIES, SearchSpec(), file, crew, QUIET)
    assert failures
    assert all("SGD Nesterov" in line and "no memory" in line for line in failures)
    assert {spec.optimizer for spec in file.runs} == {"kfc-adam"}
    assert len(file.runs) == 6


def test_processes_train_and_say_what_failed() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(40, 784, generator=generator)
    data = RaceData("noise", Examples(pixels, pixels), Examples(pixels[:8], pixels[:8]))
    good = RunSpec("autoencoder", 8, 3, "sgd", 0.001, 0)
    too_large = RunSpec("autoencoder", 64, 3, "sgd", 0.001, 0)
    with workers(2, 1, lambda task: data) as crew:
        for spec in (good, too_large):
            assert not crew.full
            crew.start(spec, TASKS[spec.task])
        assert crew.full
        assert crew.active == {good, too_large}
        answers = dict(crew.next_finished() for _ in range(2))
        assert not crew.active
    ended = answers[good]
    assert isinstance(ended, RunResult)
    assert (len(ended.losses), ended.threads, ended.workers) == (3, 1, 2)
    assert ended.test_loss is not None
    if ended.peak_memory is not None:  # Linux
        assert ended.peak_memory > 3 * 4 * 2_837_314  # weights, gradients, momenta
    assert answers[too_large] == "ValueError: 40 examples are fewer than a batch of 64"


def test_cells_are_chosen_by_task_and_batch_size_those_of_all_first() -> None:
    everything = chosen_cells("", "")
    assert len(everything) == sum(len(task.cells) for task in TASKS.values())
    of_all = [cell.entrants is None for _, cell in everything]
    assert of_all == sorted(of_all, reverse=True)
    assert {task.name for (task, _), every in zip(everything, of_all, strict=True) if every} == set(
        TASKS
    )
    (chosen,) = chosen_cells("kfc-cifar", "4096")
    assert (chosen[0].name, chosen[1].batch_size) == ("kfc-cifar", 4096)
    assert "muon" not in chosen[1].of(("sgd", "muon"))
    quick = chosen_cells("", "", quick=True)
    assert [task.name for task, _ in quick] == list(race.QUICK_TASKS)
    assert [2 * cell.steps for _, cell in quick] == [task.cells[0].steps for task, _ in quick]
    left_out = set(chosen_optimizers("")) - set(chosen_optimizers("", quick=True))
    assert left_out == {"kfc-eigen", "kfc-inverse"}
    assert chosen_optimizers("kfc-eigen,sgd", quick=True) == ("kfc-eigen", "sgd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gtp"], "unknown task 'gtp' (did you mean 'gpt'?)"),
        (["--optimizers", "kfc-adams"], "unknown optimizer 'kfc-adams' (did you mean 'kfc-adam'?)"),
        (["--batch-sizes", "7"], "--batch-sizes 7: there are 32, 128, 512, 2048, 4096"),
        (["--batch-sizes", "7,512"], "--batch-sizes 7,512: there are 32, 128, 512, 2048, 4096"),
        (["--batch-sizes", "big"], "--batch-sizes 'big': write them as 128,512"),
        (["--data-dir", "nowhere"], "no task has its data: no folder nowhere"),
        (["--report", "--results", "none.json"], "--report: no file none.json"),
        (["--device", "gpu"], "unknown device 'gpu' (did you mean 'cpu'?)"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = invoke(*arguments)
    assert code == 2
    assert f"error: {message}" in output.replace('"', "'")
    assert "Traceback" not in output


def test_a_task_without_data_is_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be " * 400)
    raced: list[tuple[str, int]] = []
    monkeypatch.setattr(
        race,
        "run_all",
        lambda entries, *_: raced.extend((e.task, e.steps) for e in entries) or [],
    )
    results = tmp_path / "results.json"
    code, output = invoke(
        *("--data-dir", str(tmp_path), "--no-costs", "--results", str(results)),
        *("--tasks", "gpt,vit", "--batch-sizes", "128", "--optimizers", "sgd"),
    )
    assert "vit is skipped: no CIFAR-10 files in" in output
    assert raced == [("gpt", TASKS["gpt"].cells[0].steps)]
    assert (code, "no runs in" in output) == (0, True)


@pytest.mark.parametrize(("before", "during"), [(None, "1"), ("0", "0")])
def test_runs_get_huge_pages_unless_the_user_says_no(
    before: str | None, during: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv(HUGE_PAGES)
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be " * 400)
    seen: list[str | None] = []
    monkeypatch.setattr(race, "run_all", lambda *_: seen.append(os.environ.get(HUGE_PAGES)) or [])
    results = tmp_path / "results.json"
    code, output = invoke(
        *("--data-dir", str(tmp_path), "--no-costs", "--results", str(results)),
        *("--tasks", "gpt", "--batch-sizes", "128", "--optimizers", "sgd"),
    )
    assert (code, seen) == (0, [during]), output


def test_results_that_cannot_be_written_are_an_error_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be " * 400)
    monkeypatch.setattr(race, "run_all", lambda *_: pytest.fail("a run was made"))
    results = tmp_path / "tinyshakespeare.txt" / "results.json"
    code, output = invoke(
        *("--data-dir", str(tmp_path), "--tasks", "gpt", "--batch-sizes", "128"),
        *("--optimizers", "sgd", "--no-costs", "--results", str(results)),
    )
    assert (code, f"--results {results}: " in output) == (2, True), output


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    code, output = invoke("--device", "cuda")
    assert (code, "--device cuda: torch.cuda.is_available() is false" in output) == (2, True)


def test_longer_runs_are_other_runs_and_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be " * 400)
    raced: list[int] = []
    monkeypatch.setattr(race, "run_all", lambda entries, *_: raced.extend(e.steps for e in entries))
    results = tmp_path / "results.json"
    arguments = (
        *("--data-dir", str(tmp_path), "--no-costs", "--results", str(results)),
        *("--tasks", "gpt", "--batch-sizes", "128", "--optimizers", "sgd", "--length", "3"),
    )
    code, output = invoke(*arguments)
    assert (code, raced) == (0, [3 * TASKS["gpt"].cells[0].steps]), output
    ResultsFile(results).add_run(result(Entry("gpt", 128, 12, "sgd").run(0.1), 6.0))
    code, output = invoke(*arguments)
    assert code == 2
    assert "has runs of gpt on 100 examples and cpu" in output


def test_the_report_is_drawn_from_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    file = ResultsFile(path)
    for name, end in {"sgd": 6.0, "muon": 1.0, "kfc-adam": 2.0}.items():
        for seed in range(2):
            file.add_run(result(Entry("gpt", 128, 12, name).run(0.1, seed), end))
    file.add_costs([cost("sgd", 1.0, 1.0), cost("muon", 2.0, 2.0), cost("kfc-adam", 1.25, 2.0)])
    code, output = invoke("--report", "--results", str(path))
    assert code == 0, output
    assert "gpt (2-layer GPT, 128 wide, 64 characters of context), batch 128, 12 steps" in output
    assert "Lowest final loss: Muon (not KFC)." in output
    assert (
        "To Muon's final loss: fewest steps Muon (not KFC) 12; least time Muon (not KFC) 24.0"
        in (output)
    )
    # SGD's end is 6.55: KFC falls by 10/11 a step, Muon by one.
    assert "To SGD Nesterov's final loss: fewest steps Muon (not KFC) 7" in output
    assert "least time SGD Nesterov (not KFC) 12.0" in output
    figures = json.loads((tmp_path / "results-report.json").read_text())
    assert [s["optimizer"] for s in figures["cells"][0]["standings"]] == ["sgd", "muon", "kfc-adam"]
    assert (tmp_path / "results-gpt-128-12.png").read_bytes().startswith(b"\x89PNG")


def test_quick_has_fewer_rates_and_one_seed_and_shortens_nothing(tmp_path: Path) -> None:
    assert (QUICK_SEARCH.rates, QUICK_SEARCH.widenings, QUICK_SEARCH.seeds) == (2, 0, 1)
    crew = Crew(by_distance)
    run_all(ENTRIES, QUICK_SEARCH, ResultsFile(tmp_path / "quick.json"), crew, QUIET)
    assert {spec.steps for spec in crew.made} == {12}
    assert len(crew.made) == 2 * 2
