from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from kfc_fx.tools import failures
from kfc_fx.tools.cli import app

SHORT = ["--epochs", "2", "--train-size", "256", "--batch-size", "64"]

INTERRUPTING = """
import signal
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == {call}:
            signal.raise_signal(signal.SIGINT)
        return self.layers(x)
"""


def kfc_fx(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])


def fails_in_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_digits_by_sgd_and_adamw(tmp_path: Path) -> None:
    result = kfc_fx("train", "--optimizers", "sgd,adamw", "--save", "new/run.json", *SHORT)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "digits-net on digits" in result.output
    assert "SGD Nesterov" in result.output
    assert "test accuracy" in result.output
    assert "plot: runs/train.png" in result.output
    with Image.open(tmp_path / "runs" / "train.png") as image:
        assert image.format == "PNG"
    saved = json.loads((tmp_path / "new" / "run.json").read_text())
    assert [run["optimizer"] for run in saved["runs"]] == ["sgd", "adamw"]
    assert [run["steps"] for run in saved["runs"]] == [8, 8]
    assert saved["settings"]["run"] == {"epochs": 2, "batch_size": 64, "seed": 0, "device": "cpu"}
    # The same parameters and the same first batch, hence the same first loss.
    first_losses = {run["losses"][0] for run in saved["runs"]}
    assert len(first_losses) == 1


@pytest.mark.parametrize("scaling", ["adam", "eigen", "inverse"])
def test_digits_by_kfc_and_sgd(tmp_path: Path, scaling: str) -> None:
    result = kfc_fx("train", "--scaling", scaling, "--save", "run.json", "--epochs", "4")
    assert result.exit_code == 0, result.output
    assert f"KFC ({scaling})" in result.output
    assert "to the loss that SGD Nesterov ends with" in " ".join(result.output.split())
    kfc, sgd = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert kfc["losses"][0] == sgd["losses"][0]
    assert 0 < kfc["capture_seconds"] < kfc["seconds"][0]
    assert sgd["capture_seconds"] == 0
    assert kfc["iterations_to_target"] < sgd["iterations_to_target"]
    assert kfc["test_accuracy"] > 0.8


def test_an_autoencoder_of_the_digits(tmp_path: Path) -> None:
    result = kfc_fx(
        *("train", "--model", "digits-autoencoder", "--optimizers", "kfc,sgd,adamw"),
        *("--save", "run.json", "--epochs", "12"),
    )
    assert result.exit_code == 0, result.output
    assert "test loss" in result.output
    kfc, sgd, adamw = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert kfc["losses"][0] == sgd["losses"][0] == adamw["losses"][0]
    assert kfc["final_loss"] < 0.9 * min(sgd["final_loss"], adamw["final_loss"])
    assert kfc["test_loss"] == pytest.approx(kfc["final_loss"], rel=0.2)
    assert "accuracy" not in result.output


def test_a_model_without_layers_for_kfc_fails_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.w = nn.Parameter(torch.zeros(64, 10))\n"
        "    def forward(self, x):\n        return torch.einsum('nchw,hwk->nk', x,"
        " self.w.reshape(8, 8, 10))\n"
    )
    result = kfc_fx("train", "--model", "bare:Net", *SHORT)
    assert result.exit_code == 2, result.output
    assert "error: " in result.stderr
    assert "Traceback" not in result.output


def test_a_seed_repeats_the_run(tmp_path: Path) -> None:
    losses = []
    for number, seed in enumerate("778"):
        file = f"{number}.json"
        result = kfc_fx(
            "train", "--optimizers", "sgd", "--no-plot", "--save", file, "--seed", seed, *SHORT
        )
        assert result.exit_code == 0, result.output
        losses.append(json.loads((tmp_path / file).read_text())["runs"][0]["losses"])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]
    assert not (tmp_path / "runs").exists()


def test_own_learning_rate_and_network(tmp_path: Path) -> None:
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    result = kfc_fx(
        "train", "--optimizers", "sgd", "--lr", "sgd=0.125", "--model", "my_network:make", *SHORT
    )
    assert result.exit_code == 0, result.output
    assert "my_network:make on digits" in result.output
    assert "0.125" in result.output


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and Python then sets no handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_with_the_table_so_far(tmp_path: Path) -> None:
    (tmp_path / "stopping.py").write_text(INTERRUPTING.format(call=7))
    result = kfc_fx(
        "train", "--model", "stopping:Network", "--optimizers", "sgd", "--save", "run.json", *SHORT
    )
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output
    assert "Interrupted; the table so far:" in result.output
    assert "SGD Nesterov stopped after 6 of 8 steps." in result.output
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["interrupted"] is True
    assert [run["steps"] for run in saved["runs"]] == [6]
    assert saved["runs"][0]["test_accuracy"] is not None
    assert (tmp_path / "runs" / "train.png").stat().st_size > 0


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "stopping_at_once.py").write_text(INTERRUPTING.format(call=1))
    result = kfc_fx("train", "--model", "stopping_at_once:Network", "--optimizers", "sgd", *SHORT)
    assert result.exit_code == 130, result.output
    assert "Interrupted" in result.output
    assert not (tmp_path / "runs" / "train.png").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data", "digit"], ["did you mean 'digits'?", "fashion-mnist"]),
        (["--model", "lenett"], ["did you mean 'lenet'?"]),
        (["--model", "kfc-cifar"], ["kfc-cifar needs images of 32x32", "8x8"]),
        (["--optimizers", "sgd,adam"], ["did you mean 'adamw'?"]),
        (["--scaling", "inverted"], ["did you mean 'inverse'?"]),
        (["--data", "mnist", "--data-dir", "nowhere"], ["no folder nowhere"]),
        (["--data", "mnist", "--data-dir", "."], ["no MNIST files in ."]),
        (["--device", "gpu"], ["--device gpu"]),
        (["--lr", "1"], ["write it as kfc=0.01"]),
        (["--save", "."], ["--save .", "directory"]),
    ],
)
def test_wrong_choices_fail_in_one_line(arguments: list[str], parts: list[str]) -> None:
    fails_in_one_line(kfc_fx("train", *arguments), *parts)


def test_debug_shows_where(tmp_path: Path) -> None:
    result = kfc_fx("train", "--data", "digit", "--debug")
    assert isinstance(result.exception, failures.CommandError)


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_missing_extras_are_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    fails_in_one_line(kfc_fx("train"), module, "pip install 'kfc_fx[demo]'")


def test_version_and_help() -> None:
    assert kfc_fx("--version").output == f"kfc_fx {version('kfc_fx')}\n"
    assert "train" in kfc_fx("--help").output
    assert "--data-dir" in kfc_fx("train", "--help").output
    assert kfc_fx("kernels", "--help").exit_code == 0


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "kfc_fx.tools", "train", "--data", "digit"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown data set 'digit' (did you mean 'digits'?)")
    assert done.stderr.count("\n") == 1
