"""Training runs in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from kfc_fx.tools.race.results import RunResult, RunSpec
from kfc_fx.tools.race.run import train, use_tensor_cores
from kfc_fx.tools.race.tasks import Examples, RaceData, TaskSpec

# A process that was forked from one which has computed gradients cannot compute any.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["kfc_fx.tools.race.run"]
CPU = torch.device("cpu")

LoadData = Callable[[TaskSpec], RaceData]


class DataFiles:
    """The data of every task, prepared once and read by each process from a file."""

    def __init__(self, folder: Path, load: LoadData) -> None:
        self._folder, self._load = folder, load

    def path(self, task: TaskSpec) -> Path:
        """The file for ``task``, written at the first call."""
        path = self._folder / f"{task.data}.pt"
        if not path.exists():
            data = self._load(task)
            torch.save((data.title, _tensors(data.train), _tensors(data.test)), path)
        return path


def _tensors(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors themselves: ``dataclasses.astuple`` would copy them, and part views."""
    return examples.inputs, examples.targets


def read_data(path: Path) -> RaceData:
    """What :class:`DataFiles` wrote."""
    title, train_set, test_set = torch.load(path, weights_only=True)
    return RaceData(title, Examples(*train_set), Examples(*test_set))


class Workers:
    """Up to ``count`` runs at a time on one device, each on ``threads`` threads."""

    def __init__(self, count: int, threads: int, files: DataFiles, device: torch.device) -> None:
        self._count, self._threads, self._files, self._device = count, threads, files, device
        self._active: dict[Connection, tuple[RunSpec, BaseProcess]] = {}
        CONTEXT.set_forkserver_preload(PRELOAD)

    @property
    def active(self) -> set[RunSpec]:
        """The runs that are on their way."""
        return {spec for spec, _ in self._active.values()}

    @property
    def full(self) -> bool:
        return len(self._active) >= self._count

    def start(self, spec: RunSpec, task: TaskSpec) -> None:
        """Start a run; only where not :attr:`full`."""
        receiver, sender = CONTEXT.Pipe(duplex=False)
        path = self._files.path(task)
        process = CONTEXT.Process(
            target=_work,
            args=(sender, spec, path, self._threads, self._count, self._device),
            daemon=True,
        )
        process.start()
        sender.close()
        self._active[receiver] = (spec, process)

    def next_finished(self) -> tuple[RunSpec, RunResult | str]:
        """Wait for one run; what it failed by, where it did."""
        receiver = wait(list(self._active))[0]
        assert isinstance(receiver, Connection)
        spec, process = self._active.pop(receiver)
        try:
            answer = receiver.recv()
        except EOFError:
            answer = "its process ended (out of memory?)"
        receiver.close()
        process.join()
        return spec, answer

    def stop(self) -> None:
        """End what is on its way."""
        for receiver, (_, process) in self._active.items():
            process.terminate()
            process.join()
            receiver.close()
        self._active.clear()


@contextmanager
def workers(
    count: int, threads: int, load: LoadData, device: torch.device = CPU
) -> Iterator[Workers]:
    """Workers and their data files, both gone at the end."""
    with tempfile.TemporaryDirectory(prefix="kfc-fx-race-") as folder:
        made = Workers(count, threads, DataFiles(Path(folder), load), device)
        try:
            yield made
        finally:
            made.stop()


def _work(
    sender: Connection, spec: RunSpec, path: Path, threads: int, count: int, device: torch.device
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    # With multi_tensor, its default, heavyball takes a schedule, and warns all the same.
    warnings.filterwarnings("ignore", message="Learning rate changed between steps")
    torch.set_num_threads(threads)
    use_tensor_cores(device)
    answer: RunResult | str
    try:
        answer = train(spec, read_data(path).to(device), workers=count)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    with suppress(BrokenPipeError):  # nobody waits any more
        sender.send(answer)
    sender.close()
