"""Incremental rendering of growing text on a terminal.

Lines that are unlikely to change are printed and scroll away; only the last few are redrawn. A live display of
the whole text could not be taller than the screen.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.syntax import Syntax

try:
    import termios
except ImportError:  # not on Windows
    termios = None  # type: ignore[assignment]

Render = Callable[[str], RenderableType]
REDRAWN = 6  # number of last lines that the next word of a paragraph or list may change


def as_markdown(text: str) -> RenderableType:
    return Markdown(text)


def as_python(text: str) -> RenderableType:
    return Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=True)


class LiveText:
    """The growing text; `push` appends to it."""

    def __init__(self, live: Live, render: Render) -> None:
        self._live, self._render = live, render
        self._text = ""
        self._printed = 0  # number of lines printed for good
        self._due = 0.0

    def push(self, piece: str) -> None:
        self._text += piece
        if time.monotonic() >= self._due:
            self.draw(REDRAWN)

    def draw(self, redrawn: int) -> None:
        """Print all lines but the last `redrawn`, and display those."""
        began = time.monotonic()
        with uninterrupted():  # an interrupt between print and count would print lines twice
            self._draw(redrawn)
        took = time.monotonic() - began
        self._due = time.monotonic() + max(0.08, 5 * took)  # long answers are redrawn less often

    def _draw(self, redrawn: int) -> None:
        console = self._live.console
        lines = console.render_lines(self._render(self._text), pad=False) if self._text.strip() else []
        fixed = max(self._printed, len(lines) - redrawn)
        if fixed > self._printed and (final := lines[self._printed : fixed]):
            console.print(_segments(final), end="")
            self._printed = fixed
        self._live.update(_segments(lines[self._printed :]), refresh=True)


def _segments(lines: list[list[Segment]]) -> Segments:
    return Segments([segment for line in lines for segment in [*line, Segment.line()]])


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Turn off the terminal's echo, so that keys (such as ^C) do not disturb the display."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextlib.contextmanager
def live_text(console: Console, render: Render) -> Iterator[LiveText]:
    """Yield a LiveText; on exit, also by Ctrl-C, the whole text is printed."""
    live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
    with silent_keys(), live:
        text = LiveText(live, render)
        try:
            yield text
        finally:
            text.draw(0)
