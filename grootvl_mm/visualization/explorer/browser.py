"""A headless browser for testing and benchmarking the explorer's page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
HOW_TO_GET_ONE = "Debian: apt install chromium; elsewhere: python -m playwright install chromium"


@contextmanager
def open_browser() -> Iterator["Browser"]:
    """Start the system's Chromium or Chrome, or else the one installed by Playwright.

    Raises:
        ModuleNotFoundError: Playwright is not installed.
        FileNotFoundError: There is no browser.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"no Chromium or Chrome found; {HOW_TO_GET_ONE}")
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()
