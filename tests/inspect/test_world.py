"""What many processes would hold, send and compute, without any."""

from __future__ import annotations

import pytest
from torchvision.models import resnet18, resnet50
from typer.testing import CliRunner

from kfc_fx.distributed import generic_rows
from kfc_fx.inspect.document import build_document
from kfc_fx.inspect.inputs import parse_input
from kfc_fx.inspect.inspection import inspect_model
from kfc_fx.inspect.world import WAYS, Machine, world_document
from kfc_fx.tools.cli import app

TARGET = ["inspect", "torchvision.models:resnet18", "--input", "2x3x64x64"]


def told(*arguments):
    result = CliRunner().invoke(app, [*TARGET, *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def inspected():
    """ResNet-18, and its document."""
    inspection = inspect_model(resnet18(), "resnet18", [parse_input("2x3x64x64")])
    return inspection, build_document(inspection)


def world_with(inspected, ranks, way, **machine):
    inspection, document = inspected
    return world_document(inspection, document["summary"], ranks, way, Machine(**machine))


@pytest.mark.parametrize("way", ["refresh", "update", "shard"])
def test_shares_of_the_ranks(inspected, way):
    world = world_with(inspected, 8, way)
    assert [own["ranks"] for own in world["worlds"]] == [1, 8, 64, 512]
    one, eight = world["worlds"][:2]
    assert one["gradient_sent"] == one["due_sent"] == one["step_sent"] == 0
    assert one["imbalance"] == one["state_share"] == one["traffic"] == 1
    assert eight["imbalance"] < 2  # a few layers have most of the work
    names = [name for own in world["owners"] for name in own["blocks"]]
    assert len(names) == len(set(names)) == 41
    assert sum(own["refresh_share"] for own in world["owners"]) == pytest.approx(1)
    if way == "refresh":
        assert eight["state_share"] == 1
        assert eight["step_sent"] == 0 < eight["due_sent"]
    else:
        assert eight["state_share"] < 0.2
        assert eight["step_sent"] > 0
    assert eight["mean_step"] < one["mean_step"] or way == "update"


def test_the_network_counts(inspected):
    slow, fast = (world_with(inspected, 4, "update", network=n) for n in (1.0, 100.0))
    assert slow["worlds"][1]["mean_step"] != fast["worlds"][1]["mean_step"]
    assert slow["worlds"][0]["mean_step"] == fast["worlds"][0]["mean_step"]


def test_resnet50_is_shared_as_is_promised():
    inspection = inspect_model(resnet50(), "resnet50", [parse_input("2x3x32x32")])
    inspected = inspection, build_document(inspection)
    eights = {way: world_with(inspected, 8, way)["worlds"][1] for way in WAYS}
    for way in ("update", "shard"):
        assert eights[way]["state_share"] <= 0.15
    assert eights["refresh"]["traffic"] <= 1.1005
    assert all(eights[way]["imbalance"] <= 1.25 for way in WAYS)


@pytest.mark.parametrize(
    ("arguments", "title"),
    [(["--distribute", "update"], "distribute='update'"), (["--shard"], "fully_shard: shards")],
)
def test_the_table_shows_them(arguments, title):
    shown = told("--world", "4", *arguments)
    assert title in shown
    stated = "stated: 60 TFLOP/s, 2000 GB/s of memory, 25 GB/s of network a rank"
    assert stated in " ".join(shown.split())
    assert "owners of 4 ranks" in shown


def test_a_table_that_is_tied_is_divided():
    from tests.distributed.changing_models import Table

    inspection = inspect_model(Table(), "table", [parse_input("2x2x6x6")])
    document = build_document(inspection)
    shares = []
    for least in (3, 1000):  # 40 numbers, divided and on all ranks
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(generic_rows, "LEAST_NUMBERS", least)
            worlds = world_document(inspection, document["summary"], 2, "update", Machine())
        shares.append(worlds["worlds"][1])
    assert shares[0]["state_bytes"] == shares[1]["state_bytes"] - 4 * 2 * 20
    assert shares[0]["step_sent"] > shares[1]["step_sent"]


def test_the_page_has_a_tab_of_it(inspected, open_page):
    document = {**inspected[1], "world": world_with(inspected, 8, "update")}
    page = open_page(document)
    page.open_tab("world")
    world = document["world"]
    worlds, owners = page.find_all("#panel table")
    cells = [
        [cell.text for cell in row.find_elements("css selector", "td")]
        for row in worlds.find_elements("css selector", "tbody tr")
    ]
    assert [int(row[0]) for row in cells] == [own["ranks"] for own in world["worlds"]]
    assert [row[-1] for row in cells] == [f"{own['mean_step']:.3f}x" for own in world["worlds"]]
    assert "blocks are held and stepped by their owners" in page.find("#panel").text
    rows = owners.find_elements("css selector", "tbody tr")
    assert len(rows) == 8
    page.find("#expand-all").click()
    rows[3].find_element("css selector", ".link").click()
    assert any(name in page.find("#details").text for name in world["owners"][3]["blocks"])


def test_a_page_without_a_world_has_no_tab_of_it(inspected, open_page):
    page = open_page(inspected[1])
    assert not page.find_all("[data-tab=world]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--view", "world"], "--view world needs --world RANKS"),
        (["--world", "2", "--distribute", "all"], "all"),
        (["--world", "0"], "--world"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    result = CliRunner().invoke(app, [*TARGET, *arguments])
    assert result.exit_code != 0
    assert message in result.output
