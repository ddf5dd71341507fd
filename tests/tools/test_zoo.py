"""The zoo passes real models, and fails those that a compiler got wrong."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from kfc_fx.tools.cli import app
from kfc_fx.tools.zoo import command as zoo
from kfc_fx.tools.zoo import process as zoo_process
from kfc_fx.tools.zoo.case import ModelCase
from kfc_fx.tools.zoo.check import check_case, without_names
from kfc_fx.tools.zoo.compare import CheckError, relative_difference
from kfc_fx.tools.zoo.models import entries_of, find_entry
from kfc_fx.tools.zoo.process import Limits, ZooRow
from kfc_fx.tools.zoo.statistics import check_statistics, problem_of


class Wrong(nn.Module):
    """A small net that does something else once it is compiled, as a broken pass would."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)
        self.wrong = wrong
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        wrong = self.wrong if torch.compiler.is_compiling() else ""
        self.calls += 2 if wrong == "buffer" else 1
        output = self.head(x)
        if wrong == "output":
            output = output * 1.001
        if wrong == "gradient":
            output = 2 * output - output.detach()
        return output


def case_of(model: nn.Module, **options) -> ModelCase:
    return ModelCase(model.train(), (torch.randn(2, 3, 8, 8),), **options)


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_torchvision_models_pass(name):
    report = check_case(find_entry(f"torchvision/classification/{name}").build())
    assert report.bit_equal
    assert report.graphs == 1
    assert report.graph_breaks == {}
    assert report.statistics >= 2 * report.blocks > 0
    assert report.in_blocks > 0.9
    assert report.symbolic == "yes"
    assert report.silent_blocks == 0


def test_the_zoos_own_model_passes():
    (entry,) = entries_of("kfc_fx")
    assert check_case(entry.build()).in_blocks == 1


def test_a_right_model_passes_where_the_wrong_ones_fail():
    assert check_case(case_of(Wrong())).largest_difference == 0


@pytest.mark.parametrize("wrong", ["output", "gradient", "buffer"])
def test_a_model_compiled_wrongly_fails(wrong):
    with pytest.raises(CheckError, match=f"{wrong}s of the compiled model are off by"):
        check_case(case_of(Wrong(wrong)))


def test_a_wrong_statistic_fails(monkeypatch):
    from kfc_fx.statistics import sums

    add = sums.add
    monkeypatch.setattr(
        sums, "add", lambda own, block, new: add(own, block, {n: -v for n, v in new.items()})
    )
    with pytest.raises(CheckError, match=r"statistics are wrong: .* has a negative eigenvalue"):
        check_case(case_of(Wrong()))


def test_a_step_with_statistics_that_changes_the_gradients_fails(monkeypatch):
    from kfc_fx.compilation import compilation

    tap = compilation.tap
    monkeypatch.setattr(compilation, "tap", lambda *given: tap(*given) * 1.5)
    with pytest.raises(CheckError, match="outputs of the step with statistics"):
        check_case(case_of(Wrong()))


class Losses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return {"loss": F.mse_loss(self.linear(x), torch.ones(4, 2))}


def test_losses_alone_fail():
    with pytest.raises(CheckError, match="no prediction in the output"):
        check_case(ModelCase(Losses(), (torch.randn(4, 3),)))


def test_frozen_parameters_are_no_part_of_the_share():
    model = Wrong()
    model.conv.requires_grad_(False)
    assert check_case(case_of(model)).in_blocks == 1


@pytest.mark.parametrize(
    ("statistic", "problem"),
    [
        (torch.eye(3)[None], ""),
        (torch.zeros(1, 3, 3), ""),
        (torch.ones(1, 1, 4), ""),
        (torch.tensor([[[1.0, torch.nan], [torch.nan, 1.0]]]), "is not finite"),
        (torch.tensor([[[1.0, 0.5], [0.4, 1.0]]]), "is asymmetric"),
        (torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), "has a negative eigenvalue"),
        (torch.tensor([[[1.0, -0.1]]]), "has a negative entry"),
    ],
)
def test_statistics_are_judged(statistic, problem):
    found = problem_of(statistic)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_wide_statistics_are_judged_too(monkeypatch):
    from kfc_fx.tools.zoo import statistics as zoo_statistics

    monkeypatch.setattr(zoo_statistics, "CHOLESKY_LIMIT", 4)
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    good = (rows.mT @ rows)[None]
    assert problem_of(good) == ""
    direction = F.normalize(torch.randn(40, generator=torch.Generator().manual_seed(1)), dim=0)
    bad = good - 5 * torch.outer(direction, direction)
    assert list(check_statistics({"layer": {"omega": bad}})) == [
        "omega of layer has a negative eigenvalue"
    ]


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        (
            "used by node embedding_1 (embedding) at model.wpe (Embedding): no examples",
            "used by embedding: no examples",
        ),
        ("also used by node view (call_method view)", "also used by call_method view"),
        (
            "tied between calls of different kinds: embedding at wte (Embedding) and linear at  (Net)",
            "tied between calls of different kinds: embedding and linear",
        ),
        (
            "bias of a layer without a block for it (a.weight)",
            "bias of a layer without a block for it",
        ),
        ("not used in any captured graph", "not used in any captured graph"),
    ],
)
def test_reasons_are_told_without_names(reason, short):
    assert without_names(reason) == short


def test_differences_count_shapes_and_infinities():
    inf = float("inf")
    assert relative_difference(torch.tensor([1.0, inf]), torch.tensor([1.0, inf])) == 0
    assert relative_difference(torch.tensor([1.0, inf]), torch.tensor([1.0, -inf])) == inf
    assert relative_difference(torch.zeros(2), torch.zeros(3)) == inf
    assert relative_difference(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.5])) == 0.25


# -- the command ---------------------------------------------------------------------------


def test_a_process_answers_for_its_model():
    row = zoo_process.run_entry("kfc_fx/audio/conv1d_audio", Limits(120, 8))
    assert (row.status, row.reason) == ("passed", "")
    assert row.report["bit_equal"]


def test_a_model_that_hangs_is_one_failed_row():
    row = zoo_process.run_entry("kfc_fx/audio/conv1d_audio", Limits(0.01, 8))
    assert (row.status, row.reason) == ("failed", "no result within 0.01 s")


def test_a_model_over_the_memory_limit_is_one_failed_row():
    row = zoo_process.run_entry("torchvision/classification/vgg11", Limits(120, 1))
    assert (row.status, row.reason) == ("failed", "too large for the limit of 1 GiB")


def passing_row(path: str, limits: Limits) -> ZooRow:
    library, family, name = path.split("/")
    report = check_case(find_entry(path).build())
    return ZooRow(library, family, name, "passed", report=zoo.asdict(report))


def test_the_file_is_written_and_resumed(tmp_path, monkeypatch):
    path = tmp_path / "zoo.json"
    monkeypatch.setattr(zoo, "run_entry", passing_row)
    arguments = ["zoo", "audio", "--library", "kfc_fx", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "conv1d_audio" in result.output
    report = json.loads(path.read_text())
    assert report["summary"]["kfc_fx"]["passed"] == 1
    assert report["models"][0]["report"]["in_blocks"] == 1

    monkeypatch.setattr(zoo, "run_entry", lambda *_: pytest.fail("ran again"))
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0


def test_a_failure_is_counted_and_tried_again_on_demand(tmp_path, monkeypatch):
    path = tmp_path / "zoo.json"
    failed = ZooRow("kfc_fx", "audio", "conv1d_audio", "failed", "because")
    monkeypatch.setattr(zoo, "run_entry", lambda *_: failed)
    arguments = ["zoo", "--library", "kfc_fx", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "because" in result.output
    monkeypatch.setattr(zoo, "run_entry", passing_row)
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 1
    assert CliRunner().invoke(app, [*arguments, "--resume", "--retry"]).exit_code == 0


def test_models_are_listed_and_wrong_names_refused():
    listed = CliRunner().invoke(app, ["zoo", "--list", "--library", "torchvision", "/raft"])
    assert listed.output.split() == [
        "torchvision/optical_flow/raft_large",
        "torchvision/optical_flow/raft_small",
    ]
    nothing = CliRunner().invoke(app, ["zoo", "no_such_model", "--library", "kfc_fx"])
    assert nothing.exit_code == 2
    unknown = CliRunner().invoke(app, ["zoo", "--library", "torchvison"])
    assert unknown.exit_code == 2
    assert "did you mean 'torchvision'" in unknown.output


def test_every_torchvision_model_has_an_entry():
    import torchvision

    names = {entry.name for entry in entries_of("torchvision")}
    assert names == set(torchvision.models.list_models())
