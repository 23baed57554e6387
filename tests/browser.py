"""A real browser for the tests of the page: the system's Chromium, without a window."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

PATIENCE_MS = 60_000
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Window:
    """A page in the browser, and what its console complained of."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def hear(self, message: ConsoleMessage) -> None:
        """Keep what is an error or a warning."""
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def wait(self, selector: str, text: str = "") -> str:
        """Return the text of the first element that has this text in it, once there is one."""
        found = self.page.locator(selector, has_text=text).first
        found.wait_for(timeout=PATIENCE_MS)
        return found.inner_text()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the system's Chromium; skip the test where there is none, fail it under ``CI=true``."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        told = "there is no Chromium; as root, tests/install_chromium.sh installs one"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must test the page in a real browser: {told}")
        pytest.skip(f"NOT TESTED in a real browser: {told}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS, timeout=PATIENCE_MS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def window(
    browser: Browser, url: str, *, width: int = 1280, scheme: str = "light"
) -> Iterator[Window]:
    """Open a page in a window of its own, with nothing remembered."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE_MS)
    opened = Window(page)
    page.on("console", opened.hear)
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    try:
        page.goto(url)
        yield opened
    finally:
        page.close()
