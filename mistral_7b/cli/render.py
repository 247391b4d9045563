"""Text that grows on a terminal, rendered again and again while it comes.

Lines that will hardly change any more are printed for good and scroll away; only the last few are
redrawn. A live display of the whole text could not be taller than the screen.
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
REDRAWN = 6  # last lines: what one more word can still change in a paragraph or list


def as_markdown(text: str) -> RenderableType:
    return Markdown(text)


def as_python(text: str) -> RenderableType:
    return Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=True)


class LiveText:
    """The growing text; `push` adds to it."""

    def __init__(self, live: Live, render: Render) -> None:
        self._live, self._render = live, render
        self._text = ""
        self._printed = 0  # lines that stand for good
        self._due = 0.0

    def push(self, piece: str) -> None:
        self._text += piece
        if time.monotonic() >= self._due:
            self.draw(REDRAWN)

    def draw(self, redrawn: int) -> None:
        """Print all lines but the last `redrawn`, and show those below."""
        began = time.monotonic()
        with uninterrupted():  # a line must not be printed and forgotten, or it would stand there twice
            self._draw(redrawn)
        took = time.monotonic() - began
        self._due = time.monotonic() + max(0.08, 5 * took)  # a long answer is drawn less often, not slower

    def _draw(self, redrawn: int) -> None:
        console = self._live.console
        lines = console.render_lines(self._render(self._text), pad=False) if self._text.strip() else []
        stand = max(self._printed, len(lines) - redrawn)
        if stand > self._printed and (final := lines[self._printed : stand]):
            console.print(_segments(final), end="")
            self._printed = stand
        self._live.update(_segments(lines[self._printed :]), refresh=True)


def _segments(lines: list[list[Segment]]) -> Segments:
    return Segments([segment for line in lines for segment in [*line, Segment.line()]])


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C that comes meanwhile wait until the end."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers it to the main one
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
    """Keep the terminal from showing keys, ^C among them, in the midst of what is drawn."""
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
    """A LiveText on a terminal; on leaving, by Ctrl-C too, all of it stands."""
    live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
    with silent_keys(), live:
        text = LiveText(live, render)
        try:
            yield text
        finally:
            text.draw(0)
