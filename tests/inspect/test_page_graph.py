"""The graph in a browser: what is open, what is selected, and its links with the source."""

from __future__ import annotations

import pytest

from tests.inspect.documents import residual_document


@pytest.fixture
def page(open_page):
    return open_page(residual_document((2, 2), run=True))


def test_starts_collapsed(page):
    assert page.drawn() == [
        "node:x",
        "module:conv1#0",
        "module:bn1#0",
        "node:relu",
        "module:layer1#0",
        "module:layer2#0",
        "node:flatten",
        "module:fc#0",
        "node:output",
    ]


def test_expands_and_collapses(page):
    page.toggle("module:layer1#0")
    assert page.item("module:layer1#0").get_attribute("aria-expanded") == "true"
    assert page.is_drawn("module:layer1.0#0")
    page.toggle("module:layer1#0")
    assert page.item("module:layer1#0").get_attribute("aria-expanded") == "false"
    assert not page.is_drawn("module:layer1.0#0")


def test_double_click_expands(page):
    page.double_click(page.box("module:layer1#0"))
    assert page.is_drawn("module:layer1.1#0")


def test_a_module_that_is_called_again_is_drawn_again(page):
    page.toggle("module:layer1#0")
    page.toggle("module:layer1.0#0")
    labels = page.script(
        "return [...document.querySelectorAll('#scene .item .name')].map((n) => n.textContent)"
    )
    assert {"relu", "relu ·2", "relu ·3"} <= set(labels)


def test_statistics_are_nodes(page):
    page.toggle("module:conv1#0")
    assert page.item("node:emit").get_attribute("class").startswith("item emission")
    texts = page.item("node:probe_conv1_omega").text
    assert "Ω" in texts
    assert "[576, 576]" in texts
    assert page.find_all(".edge.statistic")


def test_parameters_are_shown_on_request(page):
    page.toggle("module:conv1#0")
    assert not page.is_drawn("node:l_conv1_weight")
    page.find("#show-parameters").click()
    assert page.is_drawn("node:l_conv1_weight")
    assert page.is_drawn("module:conv1#0"), "what is open stays open"


def test_selecting_shows_details(page):
    page.toggle("module:layer1#0")
    page.toggle("module:layer1.0#0")
    page.box("module:layer1.0.conv2#0").click()
    details = page.find("#details").text
    assert "Block layer1.0.conv2" in details
    assert "64 × 576" in details
    assert "3x3, stride 1" in details
    assert "effective rank" in details
    assert page.find("#details canvas.heat").get_attribute("width") == "16"


def test_a_selected_node_marks_its_line(page):
    page.toggle("module:conv1#0")
    page.box("node:conv1").click()
    assert page.selected() == "node:conv1"
    assert page.marked_lines() == [
        "    conv1 = torch.conv2d(x, l_conv1_weight);  # [8, 64, 16, 16]"
    ]
    marked = page.find(".line.marked").rect
    panel = page.find("#panel").rect
    assert panel["y"] <= marked["y"] <= panel["y"] + panel["height"]


def test_a_line_selects_its_node(page):
    page.line("conv2d_norm_3 = ").click()
    assert page.selected() == "node:conv2d_norm_3"
    assert page.is_drawn("module:layer1.1#0"), "the modules around it are opened"


def test_a_line_of_a_hidden_parameter_brings_parameters(page):
    page.line("l_bn1_weight = ").click()
    assert page.selected() == "node:l_bn1_weight"
    assert page.find("#show-parameters").is_selected()


def test_update_source_and_graph_are_linked(page):
    page.open_tab("accumulate")
    page.line('"layer1.1.conv2.omega"').click()
    assert page.selected() == "node:conv2d_4"
    assert any('"layer1.1.conv2.omega"' in line for line in page.marked_lines())
    page.line("def accumulate_64x576(").click()
    assert page.selected() == "node:conv1", "a stack's line selects its first layer"
    assert page.find_all("#scene .related"), "and marks the others"
    page.line('accumulate_10x513(statistics, examples, state["10x513"])').click()
    assert page.selected() == "node:linear", "and so does the line of its call"


def test_colours_by_cost(page):
    assert "conv2d" in page.find("#legend").text
    page.find("#colouring input[value=cost]").click()
    assert "FLOPs" in page.find("#legend").text
    assert "FLOPs · " in page.item("module:layer2#0").text
    strength = "return parseFloat(arguments[0].style.getPropertyValue('--strength'))"
    cheap, dear = (page.script(strength, page.item(f"module:layer{i}#0")) for i in (1, 2))
    assert 0 < cheap < dear


def test_stages_can_be_chosen(page):
    page.find(".stage[data-stage=captured]").click()
    assert page.find(".stage[data-stage=captured]").get_attribute("aria-pressed") == "true"
    assert page.is_drawn("node:conv1"), "a module of one node is drawn as that node"
    assert not page.find_all("#scene .emission")


def test_search_finds_selects_and_clears(page):
    field = page.find("#search-input")
    field.send_keys("layer2.1.conv3")
    results = [row.text for row in page.find_all("#search-results [role=option]")]
    assert results[0].startswith("layer2.1.conv3")
    assert page.find_all("#scene .match[data-id='module:layer2#0']"), "the closed module is marked"
    page.press("\ue007")
    assert page.selected() == "module:layer2.1.conv3#0"
    page.press("\ue00c", "\ue00c")
    assert field.get_attribute("value") == ""
    assert page.selected() is None


def test_search_says_when_nothing_is_found(page):
    page.find("#search-input").send_keys("no such node")
    assert page.find("#search-results").text == "nothing found"


def test_zoom_and_pan(page):
    transform = "return document.getElementById('scene').getAttribute('transform')"
    before = page.script(transform)
    page.find("#zoom-in").click()
    zoomed = page.script(transform)
    assert zoomed != before
    page.find("#zoom-fit").click()
    assert page.script(transform) != zoomed


def test_expand_all_shows_every_node(page):
    page.find("#show-parameters").click()
    page.find("#expand-all").click()
    nodes = [identity for identity in page.drawn() if identity.startswith("node:")]
    document = residual_document((2, 2))
    wanted = {f"node:{node['name']}" for node in document["graphs"][0]["stages"][-1]["nodes"]}
    assert set(nodes) == wanted
    page.find("#collapse-all").click()
    assert len(page.drawn()) == 9


def test_a_block_of_another_graph_is_found(open_page):
    document = residual_document((1,))
    other = residual_document((1,), first="stem.conv")
    document["graphs"].append({**other["graphs"][0], "index": 1})
    document["blocks"] += other["blocks"][:1]
    page = open_page(document)
    assert [heading.text for heading in page.find_all("#stages h3")] == ["Graph 0", "Graph 1"]
    page.script(
        "[...document.querySelectorAll('#details .link')].find((b) => b.textContent == 'stem.conv').click()"
    )
    assert page.is_drawn("module:stem.conv#0")
    assert page.find("#details h2").text == "conv1"
    page.find("#details .close").click()
    assert page.find("#details h2").text == "Overview"
