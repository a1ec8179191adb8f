"""Chromium without a window, driven by playwright, for the tests of what is seen in a browser."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def lacking() -> str:
    """Why no browser can be driven here, "" where one can."""
    if os.environ.get("NO_BROWSER"):
        return "NO_BROWSER is set"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return "" if executable() else f"no Chromium: none of {', '.join(NAMES)} is installed, nor playwright's own"


def executable() -> str:
    """The browser of this machine, else the one that `playwright install chromium` brought; "" without any."""
    found = next((place for name in NAMES if (place := shutil.which(name))), "")
    if found:
        return found
    own = sorted(_own_folder().glob("chromium-*/chrome-linux*/chrome"))
    return str(own[-1]) if own else ""


def _own_folder() -> Path:
    return Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")


@contextmanager
def browser() -> Iterator[Any]:
    """A browser that is closed afterwards. Root has no sandbox there, and pages are our own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


def watched(page: Any) -> list[str]:
    """A list that fills with a page's errors, with what it could not load and with what it asks others for."""
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("requestfailed", lambda request: troubles.append(f"not loaded: {request.url}"))
    page.on("request", lambda request: troubles.append(f"asked for {request.url}") if _outside(request.url) else None)
    return troubles


def _outside(address: str) -> bool:
    return not address.startswith(("file:", "data:", "blob:", "http://127.0.0.1", "ws://127.0.0.1"))
