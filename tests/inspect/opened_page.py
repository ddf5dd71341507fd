"""The inspector's page in a browser, as a person works with it."""

from __future__ import annotations

from typing import Any


class OpenedPage:
    """A page that selenium has open. Items are named by their ids, ``module:PATH#CALL`` or ``node:NAME``."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def script(self, source: str, *arguments: object) -> Any:
        return self.driver.execute_script(source, *arguments)

    def console(self) -> list[Any]:
        return self.driver.get_log("browser")

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def press(self, *keys: str) -> None:
        """Type into whatever has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def double_click(self, element: Any) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).double_click(element).perform()

    def item(self, identity: str) -> Any:
        """The drawn element of an item."""
        return self.find(f'#scene [data-id="{identity}"]')

    def box(self, identity: str) -> Any:
        """What of an item a pointer hits."""
        return self.find(f'#scene [data-id="{identity}"] > .box')

    def click(self, identity: str) -> None:
        """Select an item, in sight or not."""
        event = "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))"
        self.script(event, self.box(identity))

    def toggle(self, identity: str) -> None:
        self.find(f'#scene [data-id="{identity}"] > .toggle').click()

    def is_drawn(self, identity: str) -> bool:
        return bool(self.find_all(f'#scene [data-id="{identity}"]'))

    def drawn(self) -> list[str]:
        return self.script(
            "return [...document.querySelectorAll('#scene .item')].map((i) => i.dataset.id)"
        )

    def selected(self) -> str | None:
        return self.script(
            "return document.querySelector('#scene .item.selected')?.dataset.id ?? null"
        )

    def focused(self) -> str | None:
        """Id of the element with the focus: an item's, else its own."""
        return self.script("const e = document.activeElement; return e.dataset.id ?? e.id")

    def marked_lines(self) -> list[str]:
        """Texts of the highlighted lines of source."""
        return self.script(
            "return [...document.querySelectorAll('.line.marked')].map((l) => l.textContent)"
        )

    def line(self, text: str) -> Any:
        """The first line of source that contains a text."""
        found = self.script(
            "return [...document.querySelectorAll('.code .line')].find((l) => l.textContent.includes(arguments[0]))",
            text,
        )
        assert found is not None, text
        self.script("arguments[0].scrollIntoView({block: 'center'})", found)
        return found

    def open_tab(self, name: str) -> None:
        self.find(f"#tab-{name}").click()

    def prefer(self, scheme: str) -> None:
        """Ask for the light or the dark scheme, as the operating system would."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
