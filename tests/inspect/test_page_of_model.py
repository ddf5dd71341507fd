"""The page of networks that are really captured: what the passes name is found in it again."""

from __future__ import annotations

import pytest
from torch import nn

from kfc_fx.inspect.document import build_document
from kfc_fx.inspect.inputs import parse_input
from kfc_fx.inspect.inspection import InspectionOptions, inspect_model


class Tokens(nn.Module):
    """Convolution, batch norm and packed attention, each in a module of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head((tokens + mixed).mean(1))


@pytest.fixture(scope="module", params=["dynamo", "symbolic"])
def document(request):
    options = InspectionOptions(capture=request.param)
    model = Tokens()
    if request.param == "symbolic":
        model = nn.Sequential(model.stem, nn.Flatten(), nn.Linear(8 * 36, 4))
    return build_document(inspect_model(model, "tokens", [parse_input("2x3x8x8")], options))


@pytest.fixture
def page(open_page, document):
    page = open_page(document)
    page.find("#expand-all").click()
    return page


def test_every_stage_draws_all_its_nodes(page, document):
    page.find("#show-parameters").click()
    for position, stage in enumerate(document["graphs"][0]["stages"]):
        page.script("document.querySelectorAll('.stage')[arguments[0]].click()", position)
        page.find("#expand-all").click()
        nodes = {identity for identity in page.drawn() if identity.startswith("node:")}
        assert nodes == {f"node:{node['name']}" for node in stage["nodes"]}


def test_no_computation_is_hidden(page, document):
    drawn = set(page.drawn())
    for node in document["graphs"][0]["stages"][-1]["nodes"]:
        if node["role"] in ("op", "site", "emission", "probe") and node["shape"] and node["args"]:
            assert f"node:{node['name']}" in drawn


def test_every_node_has_a_line_and_back(page, document):
    for node in document["graphs"][0]["stages"][-1]["nodes"]:
        if f"node:{node['name']}" not in page.drawn():
            continue
        page.click(f"node:{node['name']}")
        marked = page.marked_lines()
        assert len(marked) == 1, node["name"]
        assert node["name"] in marked[0] or node["op"] == "output"
        page.script("document.querySelector('.line.marked').click()")
        assert page.selected() == f"node:{node['name']}"


def test_every_block_is_found_in_the_update(page, document):
    page.open_tab("apply")
    for block in document["blocks"]:
        page.script(
            "[...document.querySelectorAll('.close')].forEach((b) => b.click());"
            "[...document.querySelectorAll('#details .link')].find((b) => b.textContent === arguments[0]).click()",
            block["name"],
        )
        assert any(f'"{block["weight"]}"' in line for line in page.marked_lines()), block["name"]
