"""Pictures of the inspector's page, for the page on inspecting: ``python docs/screenshots.py``.

It needs chromium and its driver, selenium, Pillow and torchvision.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver

FOLDER = Path(__file__).parent / "pictures"
TARGET = ("torchvision.models:resnet18", "--input", "32x3x224x224", "--world", "8")
SIZE = (1280, 900)
COLOURS = 128
TABS = {"stage": "graph", "apply": "update", "world": "world"}


def browser() -> webdriver.Chrome:
    """Chromium without a window."""
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument(f"--window-size={SIZE[0]},{SIZE[1]}")
    options.binary_location = "/usr/bin/chromium"
    return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))


def main() -> None:
    """Write a picture of each tab."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        command = [sys.executable, "-m", "kfc_fx.tools", "inspect", *TARGET]
        subprocess.run([*command, "--view", "html", "--save", str(page)], check=True)
        driver = browser()
        try:
            driver.set_window_size(*SIZE)
            driver.get(page.as_uri())
            for tab, name in TABS.items():
                driver.find_element("css selector", f"[data-tab={tab}]").click()
                time.sleep(1.0)  # what moves comes to rest
                whole = Path(folder) / "shot.png"
                driver.save_screenshot(str(whole))
                image = Image.open(whole).convert("RGB").quantize(COLOURS)
                image.save(FOLDER / f"inspector-{name}.png", optimize=True)
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
