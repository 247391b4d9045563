"""The browser and the scripted server for tests of the page, which are skipped without the browser.

Both have module scope: Playwright's event loop occupies this thread, where other tests need their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.page.browser import Scripted, opened

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def scripted(browser: Any) -> Iterator[Scripted]:
    """The scripted server. A test that kills it must start it again."""
    server = Scripted()
    yield server
    server.kill()


@pytest.fixture
def page(browser: Any, scripted: Scripted) -> Iterator[Any]:
    """The page in a new browser profile; fails the test if its scripts report errors."""
    page = opened(browser, scripted.url)
    yield page
    page.context.close()
    assert page.faults == []
