"""One script, by its own optimizer and by KFC, each in a process and a copy of its own."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kfc_fx.tools.scripts.child import ModelAccount, Request, Run
from kfc_fx.tools.scripts.edits import Edit, PatternError, edited
from kfc_fx.tools.scripts.table import Script

LARGEST_FILE = 32 * 2**20
"""Of the files that are copied; larger ones are data and checkpoints."""

END_SHARE = 0.2
"""Of the steps: the losses of the last ones are averaged."""


@dataclass(frozen=True)
class ScriptRow:
    """Both runs of a script, or why there are none."""

    name: str
    lines: int
    flags: tuple[str, ...]
    """Of the script, that its run by KFC got besides."""
    losses: tuple[str, ...]
    own: Run | None
    kfc: Run | None
    error: str = ""

    @property
    def failure(self) -> str:
        """Why the row has no figures, or an empty text."""
        if self.own is not None and self.own.error:
            return f"as it ships: {self.own.error}"
        return self.error if self.kfc is None else self.kfc.error


def compared(
    name: str, script: Script, folder: Path, data_dir: Path | None, steps: int, seconds: float
) -> ScriptRow:
    """Run a script twice.

    Args:
        folder: with the checkouts.
        data_dir: a folder with data sets of the user's.
        steps: after which each run ends.
        seconds: after which a run is given up.
    """
    ways = (((), ()), (script.edits, script.kfc_arguments))
    runs: list[Run] = []
    error = ""
    with ExitStack() as copies:
        try:
            folders = [Path(copies.enter_context(tempfile.TemporaryDirectory())) for _ in ways]
            places = [
                _copied(script, folder, copy, edits)
                for copy, (edits, _) in zip(folders, ways, strict=True)
            ]
            for copy, place, (edits, flags) in zip(folders, places, ways, strict=True):
                request = _request(script, place, flags, data_dir, steps, by_kfc=bool(edits))
                runs.append(_run(request, copy, seconds))
                if runs[-1].error:
                    break
        except (PatternError, OSError, TimeoutError) as found:
            error = str(found)
    own, kfc = (*runs, None, None)[:2]
    return ScriptRow(name, script.lines, script.kfc_arguments, script.losses, own, kfc, error)


def end_loss(losses: list[float]) -> float:
    """The mean over the last fifth of the steps."""
    return statistics.fmean(losses[-max(1, round(END_SHARE * len(losses))) :])


def _copied(script: Script, folder: Path, copy: Path, edits: tuple[Edit, ...]) -> Path:
    """The project in a folder of its own, with the edits made; returns the path of the script.

    Where nothing of the project beside the script's own folder is needed, only that is copied.

    Raises:
        PatternError: the script, or a statement of it, is not there.
    """
    own = Path(script.path)
    whole = own.parent == Path(".") or bool(script.imports)
    start = folder / script.project / (Path() if whole else own.parent)
    place = copy / script.project / (Path() if whole else own.parent)
    if not (folder / script.project / own).is_file():
        raise PatternError(f"no {own} in {folder / script.project}")
    shutil.copytree(start, place, ignore=_left_out)
    for file in {edit.file or script.path for edit in edits}:
        path = copy / script.project / file
        here = [edit for edit in edits if (edit.file or script.path) == file]
        try:
            path.write_text(edited(path.read_text("utf-8"), here), "utf-8")
        except PatternError as error:
            raise PatternError(f"{file}: {error}") from error
    return copy / script.project / own


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Names that are not copied."""
    paths = {name: Path(folder) / name for name in names}
    large = {n for n, p in paths.items() if p.is_file() and p.stat().st_size > LARGEST_FILE}
    return large | {".git"} & set(names)


def _request(
    script: Script,
    place: Path,
    flags: tuple[str, ...],
    data_dir: Path | None,
    steps: int,
    *,
    by_kfc: bool,
) -> Request:
    project = place.parents[len(Path(script.path).parts) - 1]
    return Request(
        script=str(place),
        arguments=[*script.arguments, *flags],
        imports=[str(project / path) for path in script.imports],
        data=list(script.data),
        data_dir=None if data_dir is None else str(data_dir.resolve()),
        steps=steps,
        optimizers=0 if script.by_hand and not by_kfc else len(script.losses),
        largest_batch=script.largest_batch,
    )


def _run(request: Request, folder: Path, seconds: float) -> Run:
    """In a process, on a terminal of its own: there are scripts that ask for its width.

    Raises:
        TimeoutError: it takes longer than that.
    """
    asked, answer, log = (folder / f"kfc_fx_{name}" for name in ("request", "result", "log"))
    asked.write_text(json.dumps(asdict(request)))
    command = [sys.executable, "-m", "kfc_fx.tools.scripts.child", str(asked), str(answer)]
    ours, theirs = os.openpty()
    try:
        with log.open("wb") as written:
            subprocess.run(
                command, stdin=theirs, stdout=written, stderr=written, timeout=seconds, check=False
            )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no end within {seconds:g} s") from error
    finally:
        os.close(ours)
        os.close(theirs)
    if not answer.exists():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return Run([], [], None, None, [], [], f"the process died: {' '.join(last)}")
    return _read(json.loads(answer.read_text()))


def _read(found: dict[str, Any]) -> Run:
    return Run(**{**found, "models": [ModelAccount(**own) for own in found["models"]]})
