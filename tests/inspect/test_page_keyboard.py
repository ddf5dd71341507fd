"""The page without a pointer, and for those who do not see it."""

from __future__ import annotations

import pytest

from tests.inspect.documents import residual_document

DOWN, UP, RIGHT, ENTER, ESCAPE, TAB = "\ue015", "\ue013", "\ue014", "\ue007", "\ue00c", "\ue004"


@pytest.fixture
def page(open_page):
    return open_page(residual_document((2, 2)))


def focus_graph(page):
    page.script("document.querySelector('#scene .item[tabindex=\"0\"]').focus()")


def test_tab_reaches_every_part_in_order(page):
    reached = []
    for _ in range(40):
        page.press(TAB)
        part = page.script(
            "return document.activeElement.closest('header, #stages, #modules, #scene, #graph-tools,"
            " #details, #divider, #tabs, .code')?.id || document.activeElement.closest('header, .code')?.tagName"
        )
        if part and part not in reached:
            reached.append(part)
    order = [
        "HEADER",
        "stages",
        "modules",
        "scene",
        "graph-tools",
        "details",
        "divider",
        "tabs",
        "DIV",
    ]
    assert reached == order


def test_arrows_follow_the_edges(page):
    focus_graph(page)
    page.press(DOWN, DOWN)
    assert page.focused() == page.selected() == "module:bn1#0"
    page.press(UP)
    assert page.selected() == "module:conv1#0"


def test_enter_opens_and_closes(page):
    page.box("module:layer1#0").click()
    page.press(ENTER)
    assert page.is_drawn("module:layer1.0#0")
    assert page.focused() == "module:layer1#0"
    page.press(DOWN)
    assert page.selected() == "module:layer1.0#0", "down goes into an open module"
    page.press(UP, ENTER)
    assert not page.is_drawn("module:layer1.0#0")


def test_down_leaves_an_open_module(page):
    page.toggle("module:conv1#0")
    page.box("node:emit").click()
    for _ in range(3):
        page.press(DOWN)
    assert page.selected() not in ("node:emit", None)


def test_arrows_go_sideways(page):
    page.toggle("module:conv1#0")
    sides = {"node:probe_conv1_omega", "node:probe_conv1_gamma"}
    left = min(sides, key=lambda name: page.box(name).rect["x"])
    page.box(left).click()
    page.press(RIGHT)
    assert {left, page.selected()} == sides


def test_slash_searches_and_escape_returns(page):
    focus_graph(page)
    page.press("/")
    assert page.focused() == "search-input"
    page.press("fc", ENTER)
    assert page.selected() == page.focused() == "module:fc#0"
    page.press(ESCAPE, ESCAPE)
    assert page.selected() is None


def test_the_module_tree_has_arrows(page):
    page.script("document.querySelector('#modules [tabindex=\"0\"]').focus()")
    page.press(DOWN, DOWN, DOWN)
    assert page.focused() == page.selected() == "module:layer1#0"
    page.press(RIGHT)
    assert page.is_drawn("module:layer1.0#0")


def test_lines_are_chosen_by_keys(page):
    page.script("document.querySelector('.code').focus()")
    page.press(*[DOWN] * 3, ENTER)
    assert page.selected() == "node:l_bn1_bias"


def test_tabs_are_switched_by_arrows(page):
    page.find("#tab-stage").click()
    page.press(RIGHT)
    assert page.focused() == "tab-accumulate"
    assert page.find("#tab-accumulate").get_attribute("aria-selected") == "true"


def test_focus_is_visible(page):
    focus_graph(page)
    page.press(DOWN)
    width = "return getComputedStyle(arguments[0]).strokeWidth"
    assert page.script(width, page.box("module:conv1#0")) == "3.5px"
    page.press(TAB)
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.script(outline) == "solid"


def test_everything_has_a_name(page):
    page.find("#expand-all").click()
    nameless = page.script(
        "return [...document.querySelectorAll('button, input, [role]')].filter((e) =>"
        " !['presentation', 'group', 'tabpanel', 'status', 'search'].includes(e.getAttribute('role'))"
        " && !(e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent.trim()"
        " || e.labels?.length || e.classList.contains('line'))).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    label = page.item("node:conv1").get_attribute("aria-label")
    assert label == "conv1, site, torch.conv2d, [8, 64, 16, 16], block conv1"


def test_what_happens_is_announced(page):
    page.toggle("module:layer1#0")
    page.find("#search-input").send_keys("layer1.0.conv1")
    assert page.find("#status").get_attribute("textContent").endswith("results")
