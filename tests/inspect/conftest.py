"""A headless Chromium that opens the inspector's pages from disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kfc_fx.inspect.page import render
from tests.inspect.opened_page import OpenedPage

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        pytest.skip("no Chromium with chromedriver on this machine: the page is not opened")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=chromedriver)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def open_page(driver: Any, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], OpenedPage]]:
    """Writes a document's page to disk and opens it; fails on anything in the console."""

    def open_document(document: dict[str, Any]) -> OpenedPage:
        path = tmp_path / "page.html"
        path.write_text(render(document), encoding="utf-8")
        driver.get(path.as_uri())
        page = OpenedPage(driver)
        assert page.script("return document.documentElement.dataset.ready") == "true", (
            page.console()
        )
        return page

    driver.get_log("browser")
    yield open_document
    assert driver.get_log("browser") == []
