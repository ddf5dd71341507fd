"""What many processes would hold, send and compute, without any."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kfc_fx.tools.cli import app

TARGET = ["inspect", "torchvision.models:resnet18", "--input", "2x3x64x64"]


def told(*arguments):
    result = CliRunner().invoke(app, [*TARGET, *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    "way", [["--distribute", "refresh"], ["--distribute", "update"], ["--shard"]]
)
def test_shares_of_the_ranks(way):
    world = json.loads(told("--world", "8", *way, "--json"))["world"]
    assert [own["ranks"] for own in world["worlds"]] == [1, 8, 64, 512]
    one, eight = world["worlds"][:2]
    assert one["gradient_sent"] == one["due_sent"] == one["step_sent"] == 0
    assert one["imbalance"] == one["state_share"] == one["traffic"] == 1
    assert eight["imbalance"] < 2  # a few layers have most of the work
    names = [name for own in world["owners"] for name in own["blocks"]]
    assert len(names) == len(set(names)) == 41
    assert sum(own["refresh_share"] for own in world["owners"]) == pytest.approx(1)
    if way == ["--distribute", "refresh"]:
        assert eight["state_share"] == 1
        assert eight["step_sent"] == 0 < eight["due_sent"]
    else:
        assert eight["state_share"] < 0.2
        assert eight["step_sent"] > 0
    assert eight["mean_step"] < one["mean_step"] or way[-1] == "update"


def test_the_table_shows_them():
    shown = told("--world", "4")
    assert "distribute='refresh'" in shown
    assert "stated: 60 TFLOP/s, 2000 GB/s of memory, 25 GB/s of network a rank" in shown
    assert "owners of 4 ranks" in shown
    slow = json.loads(told("--world", "4", "--network", "1", "--json"))["world"]["worlds"]
    fast = json.loads(told("--world", "4", "--network", "100", "--json"))["world"]["worlds"]
    assert slow[1]["mean_step"] != fast[1]["mean_step"]


def test_the_page_has_a_tab_of_it(open_page):
    document = json.loads(told("--world", "8", "--distribute", "update", "--view", "json"))
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


def test_a_page_without_a_world_has_no_tab_of_it(open_page):
    page = open_page(json.loads(told("--view", "json")))
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
