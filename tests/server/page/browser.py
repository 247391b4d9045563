"""What tests of the page do in a browser, and the scripted server behind it."""

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
    """The scripted server, in a process of its own that can be killed."""

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
    """A page in a profile of its own. `page.faults` collects what its scripts complained of."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **how})
    page = context.new_page()
    page.set_default_timeout(30_000)  # of a machine that others use too
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
    page.goto(url)
    ready(page)
    return page


def ready(page: Any) -> None:
    """Wait until the page listens; its scripts end a little after the browser calls it loaded."""
    page.wait_for_selector("#send svg", state="attached")


def reload(page: Any) -> None:
    page.reload()
    ready(page)


def ask(page: Any, text: str, wait: bool = True) -> None:
    """Send a message, and wait for the answer's end."""
    page.fill("#ask", text)
    page.press("#ask", "Enter")
    if wait:
        page.wait_for_selector(".message.assistant:last-child[aria-busy=false] .stats:not(:empty)")


def more(page: Any, count: int) -> None:
    """Wait until so many more tokens have come."""
    page.wait_for_function(
        "n => document.querySelectorAll('.tok').length > n", arg=page.locator(".tok").count() + count
    )


def answer(page: Any) -> Any:
    """The last answer on the screen."""
    return page.locator(".message.assistant").last


def asked(page: Any) -> list[dict[str, Any]]:
    """The bodies of all that the server was asked so far."""
    return page.request.get(page.url.split("/#")[0].rstrip("/") + "/asked").json()
