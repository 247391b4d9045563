"""The prefix cache on disk: a scheduler that reads the pages of prompts from files, and writes them there.

    worker thread    look up: which full pages of the prompt are on disk; a file found is marked as used
    engine thread    a request whose cached prefix is longer on disk than in memory is held back
    reader thread    its missing pages are read and checked, BUFFER bytes ahead
    engine thread    between two steps they are copied into KV pages; then the request is queued like any other
    engine thread    a step has filled pages of the prompt: they are copied
    writer thread    the copies are written

Only full prompt pages are written, whether computed or found in memory. Pages of generated tokens are written when
they are part of the next turn's prompt, as most answers are never read again. After a restart the last answer of a
conversation is computed again, and nothing else of it. A page is copied while its sequence holds it. If the
writer's queue is full, this is tried again after the next step; a page freed before that is dropped and counted.

One request is read at a time, in rank order. The next is read once the previous one runs, or earlier if it ranks
before it. Until the request runs, its pages and those of its prefix in memory are held, so that nothing replaces
them; they are released if a running request would otherwise be preempted. A damaged or vanished file
ends the prefix there: the rest is computed.
"""

from __future__ import annotations

import queue
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import AdapterError
from ..lora.adapters import Adapters
from ..model import Mistral7B
from .config import EngineConfig
from .disk_files import TIME_STEP, PageFiles
from .disk_io import Load, Reader, Writer
from .fingerprint import adapter_of, space_of
from .page_contents import contents_of, fill, page_bytes
from .pages import Key, PagePool, first_key, next_key
from .request import Request, SequenceState
from .scheduler import Scheduler

STEP_BYTES = 64 << 20  # copied for the writer in one step at most
PAUSE = 0.02  # seconds that a step without tokens waits for pages


@dataclass
class StoredPrefix:
    """The full pages of one prompt and their files.

    Attributes:
        loading: load number of its adapter (Adapters.loading) at look-up
        time: of the look-up (ns since the epoch)
        keys: of the files
        present: whether there was such a file
        full: pages that have been computed or found
        saved: pages that have been written, or need not be
    """

    loading: int
    time: int = field(default_factory=time.time_ns)
    keys: list[Key] = field(default_factory=list)
    present: list[bool] = field(default_factory=list)
    full: int = 0
    saved: int = 0


@dataclass
class _Loading:
    """A request whose pages are being read."""

    request: Request
    load: Load
    before: int  # pages of the prefix without them
    held: dict[int, int]  # KV pages by their places in the prompt

    def release(self, pool: PagePool) -> None:
        """Read no more, and release the pages, the last of the prompt first: it is replaced first."""
        self.load.cancelled = True
        pool.release(self.held[i] for i in sorted(self.held, reverse=True))
        self.held = {}


class DiskScheduler(Scheduler):
    """A scheduler whose prefix cache includes the files of a folder."""

    def __init__(
        self, pool: PagePool, window: int | None, config: EngineConfig, files: PageFiles, adapters: Adapters,
        space: str,
    ) -> None:  # fmt: skip
        super().__init__(pool, window, config)
        self.adapters, self.space = adapters, space
        self.files, self.page_bytes = files, page_bytes(pool)
        self.reader, self.writer = Reader(files, self.page_bytes), Writer(files, self.page_bytes, self.counts)
        self._digests: dict[int, str] = {0: ""}  # of adapters, by their load number
        self._held_back: list[Request] = []  # they count as waiting
        self._loading: _Loading | None = None
        self._ready: _Loading | None = None  # read last and not started yet: its pages are still held
        self._finalize = weakref.finalize(self, _close, self.reader, self.writer)

    # ------------------------------------------------------------------ looking up

    def check(self, request: Request) -> None:
        super().check(request)
        if request.stored is None and request.shares_prefixes and self._finalize.alive:
            request.stored = self._look_up(request)

    def _look_up(self, request: Request) -> StoredPrefix:
        """Which pages of a prompt are on disk. On any thread: inputs.py checks requests on their own."""
        stored = StoredPrefix(self.adapters.loading(request.adapter))
        if stored.loading not in self._digests:
            self._digests[stored.loading] = adapter_of(self.adapters, request.adapter)
        key = first_key(self.space, self._digests[stored.loading], request.salt)
        for at in range(0, len(request.ids) // self.page * self.page, self.page):
            key = next_key(key, request.ids[at : at + self.page])
            stored.keys.append(key)
        stored.present = self.files.touch(stored.keys, stored.time)
        return stored

    # ------------------------------------------------------------------ reading

    def add(self, request: Request) -> None:
        self.check(request)
        if (stored := request.stored) is not None:
            if self._replaced(request, stored):
                stored.keys, stored.present = [], []
            most = self._most(request, stored)
            self.counts.disk_queries += (most - self.usable_prefix(most, self._cached(request))) * self.page
        if stored is not None and self._missing(request, stored):
            self._held_back.append(request)
            self.queues.enter(request.sequences[0])
            self.queues.hold(request.sequences[0])
        else:
            super().add(request)

    def _replaced(self, request: Request, stored: StoredPrefix) -> bool:
        """Whether its adapter is another than the one that it was looked up for."""
        try:
            return self.adapters.loading(request.adapter) != stored.loading
        except AdapterError:
            return True

    def _most(self, request: Request, stored: StoredPrefix) -> int:
        """Pages that may be found: one token at least is computed."""
        return min(len(stored.keys), (len(request.ids) - 1) // self.page)

    def _cached(self, request: Request) -> Callable[[int], bool]:
        sequence = request.sequences[0]
        return lambda i: self.pool.find(sequence.key_of(i, self.page)) is not None

    def _missing(self, request: Request, stored: StoredPrefix) -> tuple[int, int, int] | None:
        """What to read: pages of the prefix in memory, and the first and last page of the longer one.

        None if the disk has nothing to add.
        """
        most, cached = self._most(request, stored), self._cached(request)
        before = self.usable_prefix(most, cached)
        after = self.usable_prefix(most, lambda i: stored.present[i] or cached(i))
        if after <= before or not self._finalize.alive:
            return None
        return before, self.first_visible(after * self.page), after

    def _join(self) -> None:
        """Take what has been read, queue the requests that are complete, and start reading for the next."""
        self.reader.news.clear()
        if self._ready is not None and self._ready.request.cached is not None:
            self._release_ready()
        if self._loading is not None and self._take(self._loading):
            self._end_load()
        while self._loading is None and self._held_back:
            request = min(self._held_back, key=_rank)
            assert request.stored is not None
            if self._ready is not None and _rank(self._ready.request) < _rank(request):
                break
            if (missing := self._missing(request, request.stored)) is None:  # it is in memory by now
                self._held_back.remove(request)
                self._queue(request)
            elif not self._begin_load(request, *missing):
                break

    def _end_load(self) -> None:
        """Queue the request that is read, with what has been read of it."""
        assert self._loading is not None
        loading, self._loading = self._loading, None
        loading.load.cancelled = True
        after = self.usable_prefix(len(loading.request.ids) // self.page, self._cached(loading.request))
        self.counts.disk_hits += max(0, after - loading.before) * self.page
        self._release_ready()
        self._ready = loading
        self._queue(loading.request)

    def _release_ready(self) -> None:
        """Release the pages that are held until the request starts. They are in the prefix cache."""
        if self._ready is not None:
            self._ready.release(self.pool)
            self._ready = None

    def _find_pages(self, sequence: SequenceState, n: int) -> bool:
        """As Scheduler's. If pages are short, those held until a request starts are released."""
        if super()._find_pages(sequence, n):
            return True
        if self._loading is not None:
            self._end_load()
        self._release_ready()
        return super()._find_pages(sequence, n)

    def _begin_load(self, request: Request, before: int, first: int, after: int) -> bool:
        """Begin to read; False while too few pages are free."""
        sequence, stored = request.sequences[0], request.stored
        assert stored is not None
        found = {i: self.pool.find(sequence.key_of(i, self.page)) for i in range(first, after)}
        held = {i: page for i, page in found.items() if page is not None}
        needed = len(found) - len(held) + sum(map(self.pool.is_idle, held.values())) + len(self.running)
        if self.running and needed > self.pool.available:
            return False
        load = Load([(i, stored.keys[i]) for i, page in found.items() if page is None], self.page_bytes)
        self._held_back.remove(request)
        self._loading = _Loading(request, load, before, {i: self.pool.share(page) for i, page in held.items()})
        self.reader.start(load)
        return True

    def _take(self, loading: _Loading) -> bool:
        """Copy the pages that have been read into KV pages; whether these were all."""
        pool = self.pool
        while True:
            try:
                item = loading.load.done.get_nowait()
            except queue.Empty:
                return False
            if item is None:
                unread = next((i for i, _ in loading.load.pages if i not in loading.held), None)
                if unread is not None and loading.request.stored is not None:
                    loading.request.stored.present[unread] = False  # it will be written again
                return True
            if not pool.available:
                return True
            i, contents = item
            key = loading.request.sequences[0].key_of(i, self.page)
            if (page := pool.find(key)) is not None:  # computed meanwhile
                loading.held[i] = pool.share(page)
                continue
            loading.held[i] = page = pool.take()
            fill(pool, page, contents)
            pool.register(page, key)
            self.counts.disk_read_bytes += len(contents)

    def _queue(self, request: Request) -> None:
        self.queues.discard(request.sequences[0])
        self.queues.push(request.sequences[0])

    def plan(self) -> list[tuple[SequenceState, int]]:
        self._join()
        planned = super().plan()
        if not planned and not self.running and self._loading is not None:
            self.reader.news.wait(PAUSE)
            self._join()
            planned = super().plan()
        return planned

    def plan_without_preempting(self) -> list[tuple[SequenceState, int]] | None:
        self._join()
        return super().plan_without_preempting()

    # ------------------------------------------------------------------ writing

    def advance(self, sequence: SequenceState, n: int) -> None:
        stored = sequence.request.stored
        if stored is not None and stored.saved < len(stored.keys) and self._finalize.alive:
            self._save(sequence, stored, sequence.computed + n)
        super().advance(sequence, n)

    def _save(self, sequence: SequenceState, stored: StoredPrefix, computed: int) -> None:
        """Queue for writing every full prompt page within the first `computed` tokens."""
        left = max(1, STEP_BYTES // self.page_bytes)
        if not stored.full:
            stored.saved = sequence.first  # it never held those before
        stored.full = max(stored.full, min(computed // self.page, len(stored.keys)))
        if sequence.first > stored.saved:  # out of the window before they could be copied
            self._drop(stored, min(sequence.first, stored.full))
        while stored.saved < stored.full and left:
            i = stored.saved
            if not self._has(stored, i) and self.writer.broken is None:
                if self.writer.full:
                    break
                contents = contents_of(self.pool, int(sequence.pages[i]))
                self.writer.put(stored.keys[i], contents, stored.time - i * TIME_STEP)
                left -= 1
            stored.saved = i + 1

    def _has(self, stored: StoredPrefix, i: int) -> bool:
        return stored.present[i] or self.writer.has(stored.keys[i], stored.time)

    def _drop(self, stored: StoredPrefix, until: int) -> None:
        """Count pages as dropped that are not written and no longer held."""
        if self.writer.broken is None:
            self.counts.disk_dropped += sum(not self._has(stored, i) for i in range(stored.saved, until))
        stored.saved = max(stored.saved, until)

    # ------------------------------------------------------------------ the end

    def end(self, sequence: SequenceState) -> None:
        super().end(sequence)
        request = sequence.request
        if (stored := request.stored) is None or request.pending:
            return
        self._drop(stored, stored.full)
        if request in self._held_back:
            self._held_back.remove(request)
        if self._loading is not None and self._loading.request is request:
            self._loading.release(self.pool)
            self._loading = None
        if self._ready is not None and self._ready.request is request:
            self._release_ready()

    def close(self) -> None:
        """Write what is queued, for CLOSE_TIMEOUT seconds at most; then write and read nothing more."""
        self._finalize()

    def check_pages(self) -> None:
        loading = [each.held.values() for each in (self._loading, self._ready) if each is not None]
        self.pool.check([*(s.held for s in self._all()), *loading])


def scheduler_for(model: Mistral7B, pool: PagePool, config: EngineConfig, adapters: Adapters) -> Scheduler:
    """An engine's scheduler. ConfigError or WriteError if the prefix cache's folder or size cannot be used."""
    window = model.args.sliding_window
    if config.prefix_cache is None:
        return Scheduler(pool, window, config)
    space = space_of(model, pool, config)
    files = PageFiles(config.prefix_cache, space[:16], page_bytes(pool), config.prefix_cache_bytes)
    return DiskScheduler(pool, window, config, files, adapters, space)


def _rank(request: Request) -> tuple[int, int, int]:
    return request.sequences[0].rank


def _close(reader: Reader, writer: Writer) -> None:
    reader.close()
    writer.close()
