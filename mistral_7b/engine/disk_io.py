"""The two threads of the prefix cache on disk. Neither touches the engine, its pages or its model.

engine ---- copies of pages ---> Writer, a queue of at most BUFFER bytes; what does not fit is left out
engine ---- Load -------------> Reader
    ^                             |
    +---- pages, checked ---------+    at most BUFFER bytes wait to be taken
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .counts import Counts
from .disk_files import PageFiles
from .pages import Key

logger = logging.getLogger("mistral_7b.engine")

BUFFER = 256 << 20  # bytes of pages on their way, in each direction
RECENT_PAGES = 2**16  # pages given to the writer that it remembers
CLOSE_TIMEOUT = 10.0  # seconds to wait for the writer when the engine is closed


def slots(page_bytes: int) -> int:
    """How many pages may be on their way."""
    return max(1, BUFFER // page_bytes)


class Writer:
    """Writes pages in a thread. After an error of the system it writes no more, and says so once in the log."""

    def __init__(self, files: PageFiles, page_bytes: int, counts: Counts) -> None:
        self.files, self.counts = files, counts
        self.broken: Exception | None = None  # why nothing more is written
        self._pages: queue.Queue[tuple[Key, Tensor, int] | None] = queue.Queue(slots(page_bytes))
        self._given: dict[Key, int] = {}  # when a page was given to it (ns since the epoch)
        self._thread = threading.Thread(target=self._run, name="prefix cache writer", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether no page can be taken now."""
        return self._pages.full()

    def has(self, key: Key, since: int) -> bool:
        """Whether a page was given to it after the time `since`."""
        return self._given.get(key, 0) > since

    def put(self, key: Key, contents: Tensor, now: int) -> None:
        """Write contents, uint8 (page_bytes,) on any device, later. Only where not `full`, by one thread."""
        if len(self._given) >= RECENT_PAGES:
            self._given.clear()
        self._given[key] = time.time_ns()
        self._pages.put_nowait((key, contents, now))

    def close(self) -> None:
        """Write what waits, for CLOSE_TIMEOUT seconds at most, and end the thread."""
        with suppress(queue.Full):
            self._pages.put(None, timeout=CLOSE_TIMEOUT)
        self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        self._try(self.files.trim)
        while (item := self._pages.get()) is not None:
            self._try(self._write, *item)
            del item  # or its memory is kept until the next one is there

    def _try(self, work: Callable[..., None], *arguments: Any) -> None:
        if self.broken is not None:
            return
        try:
            work(*arguments)
        except Exception as error:
            self.broken = error
            logger.warning("%s: nothing more is written to the prefix cache: %s", self.files.root, error)

    def _write(self, key: Key, contents: Tensor, now: int) -> None:
        self.counts.disk_written_bytes += self.files.write(key, contents.cpu().numpy().data, now)


class Load:
    """Pages that are to be read, in order; reading ends at the first that cannot be."""

    def __init__(self, pages: Sequence[tuple[int, Key]], page_bytes: int) -> None:
        self.pages = pages  # places in the prompt, with the keys of their files
        self.done: queue.Queue[tuple[int, Tensor] | None] = queue.Queue(slots(page_bytes))  # None: the end
        self.cancelled = False

    def put(self, item: tuple[int, Tensor] | None) -> bool:
        """Hand over a page, when there is room; False if the load was cancelled."""
        while not self.cancelled:
            with suppress(queue.Full):
                self.done.put(item, timeout=0.1)
                return True
        return False


class Reader:
    """Reads loads in a thread, one after another. `news` is set with each page."""

    def __init__(self, files: PageFiles, page_bytes: int) -> None:
        self.files, self.page_bytes = files, page_bytes
        self.news = threading.Event()
        self._loads: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prefix cache reader", daemon=True)
        self._thread.start()

    def start(self, load: Load) -> None:
        self._loads.put(load)

    def close(self) -> None:
        """End the thread after what it has begun."""
        self._loads.put(None)

    def _run(self) -> None:
        while (load := self._loads.get()) is not None:
            try:
                self._read(load)
            except Exception as error:  # no memory for a buffer: the request is computed
                logger.warning("%s: a prefix was not read: %s", self.files.root, error)
            load.put(None)
            self.news.set()
            del load

    def _read(self, load: Load) -> None:
        for i, key in load.pages:
            contents = torch.empty(self.page_bytes, dtype=torch.uint8)
            if load.cancelled or not self.files.read(key, contents.numpy().data):
                return
            if not load.put((i, contents)):
                return
            self.news.set()
