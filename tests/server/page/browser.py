"""Helpers for tests of the page: the scripted server's process, and actions in a browser."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


class Scripted:
    """The scripted server in a separate process, which tests can kill."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.server.page.scripted", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{self.url}/health/live", timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the scripted server did not start")

    def use_key(self, key: str) -> None:
        urllib.request.urlopen(f"{self.url}/use-key?key={key}", timeout=5).close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def opened(browser: Any, url: str, **how: Any) -> Any:
    """Open the page in a new browser profile. `page.faults` collects errors of its scripts."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **how})
    page = context.new_page()
    page.set_default_timeout(30_000)  # milliseconds; the machine may be loaded
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
    page.goto(url)
    ready(page)
    return page


def ready(page: Any) -> None:
    """Wait until the page's scripts have run, which is later than the load event."""
    page.wait_for_selector("#send svg", state="attached")


def reload(page: Any) -> None:
    page.reload()
    ready(page)


def ask(page: Any, text: str, wait: bool = True) -> None:
    """Send a message, and wait for the end of the answer unless `wait` is false."""
    page.fill("#ask", text)
    page.press("#ask", "Enter")
    if wait:
        page.wait_for_selector(".message.assistant:last-child[aria-busy=false] .stats:not(:empty)")


def more(page: Any, count: int) -> None:
    """Wait for at least `count` more tokens."""
    page.wait_for_function(
        "n => document.querySelectorAll('.tok').length > n", arg=page.locator(".tok").count() + count
    )


def answer(page: Any) -> Any:
    """The last answer on the screen."""
    return page.locator(".message.assistant").last


def asked(page: Any) -> list[dict[str, Any]]:
    """The bodies of all requests to the scripted server so far."""
    return page.request.get(page.url.split("/#")[0].rstrip("/") + "/asked").json()
