"""The page as a file: one text that loads nothing, opens fast and shows names as text."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kfc_fx.inspect import page as page_module
from kfc_fx.inspect.page import SCRIPTS, render
from tests.inspect.documents import HOSTILE, residual_document

BROWSER = Path(page_module.__file__).parent / "browser"
LOAD_BOUND = 10.0
"""Seconds; loaded machines are slow, the figure itself is printed."""

CONTRAST = """
const channel = (value) => { value /= 255; return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const luminance = (colour) => {
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const [red, green, blue] = canvas.getImageData(0, 0, 1, 1).data;
  return 0.2126 * channel(red) + 0.7152 * channel(green) + 0.0722 * channel(blue);
};
const ratio = (a, b) => {
  const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
};
const ground = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour;
  }
  return getComputedStyle(document.body).backgroundColor;
};
const found = [];
for (const text of document.querySelectorAll('#scene .item > text')) {
  const box = text.parentElement.querySelector(':scope > .title') ?? text.parentElement.querySelector(':scope > .box');
  found.push([ratio(getComputedStyle(text).fill, getComputedStyle(box).fill), text.textContent]);
}
for (const element of document.querySelectorAll('h1, h2, h3, dt, dd, button, .what, .module, td, th, .line, .line span, #legend span')) {
  if (element.textContent.trim() && element.getClientRects().length)
    found.push([ratio(getComputedStyle(element).color, ground(element)), element.textContent.slice(0, 40)]);
}
return found.sort((a, b) => a[0] - b[0]).slice(0, 3);
"""


def test_refuses_another_schema():
    with pytest.raises(ValueError, match="schema 1, this one has schema 2"):
        render({**residual_document((1,)), "schema": 2})


def test_no_script_parses_markup():
    scripts = "".join(path.read_text("utf-8") for path in BROWSER.glob("*.js"))
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "srcdoc",
    ):
        assert way not in scripts
    assert {path.name for path in BROWSER.glob("*.js")} == set(SCRIPTS)


def test_loads_nothing_and_is_deterministic():
    document = residual_document((1,))
    page = render(document)
    assert page == render(document)
    for text in ("src=", "@import", "url(http", 'href="http', "sourceMappingURL"):
        assert text not in page.replace("arrow-${", "")
    assert "default-src 'none'" in page
    assert "Permission is hereby granted" in page, "dagre's licence goes where dagre goes"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("colouring", ["kind", "cost"])
def test_text_is_readable(open_page, scheme, colouring):
    page = open_page(residual_document((1, 1), run=True))
    page.prefer(scheme)
    page.find(f"#colouring input[value={colouring}]").click()
    page.find("#expand-all").click()
    page.box("node:conv1").click()
    worst = page.script(CONTRAST)
    assert worst[0][0] >= 4.5, worst
    ground = page.script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(13, 17, 23)") == (scheme == "dark")


def test_names_stay_text(open_page):
    document = residual_document((1,), first=HOSTILE, run=True)
    document["target"] = document["warnings"][0] = document["generic"][0]["reason"] = HOSTILE
    document["graphs"][0]["stages"][-1]["nodes"][0]["target"] = HOSTILE
    document["update"]["apply"] += f"\n# {HOSTILE}"
    assert HOSTILE not in render(document)
    page = open_page(document)
    page.find("#expand-all").click()
    page.find("#search-input").send_keys("onerror")
    for tab in ("stage", "accumulate", "refresh", "apply", "run"):
        page.open_tab(tab)
    images = page.script("return document.querySelectorAll('img, #scene script').length")
    assert images == 0
    assert page.script("return typeof window.owned") == "undefined"
    assert page.find("#title").text == HOSTILE
    page.script("[...document.querySelectorAll('.module')][0].click()")
    assert page.find("#details h2").text == HOSTILE


def test_a_run_is_plotted(open_page):
    page = open_page(residual_document((1,), run=True))
    page.open_tab("run")
    captions = [caption.text for caption in page.find_all("#panel figcaption")]
    assert captions[:2] == ["Loss", "Learning rate"]
    assert "Secondsgradientstatisticsrefreshupdate" in captions
    loss = page.find("#panel .plot path.line").get_attribute("d")
    assert loss.count("M") == 2, "the step whose loss was not finite is a gap"


def test_a_document_without_graphs_opens(open_page):
    page = open_page({**residual_document((1,)), "graphs": []})
    assert "Overview" in page.find("#details").text


def test_a_graph_without_modules_is_folded(open_page):
    document = residual_document((3, 8))
    for stage in document["graphs"][0]["stages"]:
        for node in stage["nodes"]:
            node["module"] = node["module_type"] = ""
    page = open_page(document)
    assert len(page.drawn()) < 30
    page.find("#expand-all").click()
    assert page.is_drawn("node:linear")


def test_opens_a_network_of_152_layers_fast(open_page, tmp_path, capsys):
    document = residual_document((3, 8, 36, 3), run=True)
    nodes = len(document["graphs"][0]["stages"][-1]["nodes"])
    start = time.perf_counter()
    size = len(render(document).encode())
    rendered = time.perf_counter() - start
    start = time.perf_counter()
    page = open_page(document)
    opened = time.perf_counter() - start
    ready = (
        page.script("return performance.timing.domComplete - performance.timing.fetchStart") / 1e3
    )
    expand = page.script(
        "const start = performance.now(); document.getElementById('expand-all').click();"
        " document.body.getBoundingClientRect(); return (performance.now() - start) / 1000"
    )
    with capsys.disabled():
        print(
            f"\n{nodes} nodes: {size / 1e6:.2f} MB, rendered in {rendered:.2f} s, ready in {ready:.2f} s,"
            f" expanded whole in {expand:.2f} s"
        )
    assert size < 8e6
    assert opened < LOAD_BOUND
    assert expand < LOAD_BOUND
