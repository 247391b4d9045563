"""Perplexity of a text file of any size, with a sliding context: streamed, and resumable to the last bit.

With a sliding window one pass over a rolling cache is exact: each token is computed once, and sees what it would
see in any longer pass. Without one, a context of N tokens slides over the text by S tokens:

    <s> x0 x1 x2 x3 x4 x5           predicts x0 ... x6
    <s>       x3 x4 x5 x6 x7 x8     predicts only x7 x8 x9: N = 7, S = 3; each has at least N - S before it

S = 1 gives each token the longest context, for N times the work. Every context begins with BOS.

The text is read in blocks that end after the last letter or digit of a line: the vocabularies of Mistral and of
byte-level BPE end a token there whatever follows, so that the ids are those of the whole text.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..cache import RollingCache
from ..engine.fingerprint import weights_of
from ..errors import EvaluationError
from ..files import atomic_write
from ..model import Mistral7B
from ..text.tokenizer import Tokenizer
from ..text.vocabularies.contract import SPACE
from .perplexity import CHUNK, Perplexity, scored

BLOCK, LONGEST = 1 << 16, 1 << 20  # bytes that are tokenized at a time, and at most where no line ends
SAVE_EVERY = 30.0  # seconds between two writes of the state
Progress = Callable[[int], object]  # called with the number of bytes that were read


@dataclass
class _Run:
    """What a run has done: its figures, and the tokens that are not done with.

    pending    tokens to feed to a rolling cache; or those of the next context, of which `seen` were predicted
    read       bytes of the file, which `digest` identifies
    ring       tensors of the rolling cache
    """

    pending: list[int]
    read: int = 0
    tokens: int = 0
    nats: float = 0.0
    digest: str = ""
    seen: int = 0
    ring: list[Tensor] = field(default_factory=list)


def sliding_perplexity(
    model: Mistral7B,
    tokenizer: Tokenizer,
    path: str | os.PathLike[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: Progress = lambda n: None,
) -> Perplexity:
    """Measure the perplexity of a UTF-8 file, in memory that does not depend on its size.

    context, stride  N and S, for a model without a window: by default its longest context, and half of it
    state            a file that is written every half minute, and from which the same run continues after it was
                     killed, with the same result; it is removed at the end

    Raises EvaluationError for an empty file, one that is not UTF-8, numbers out of range, a state of another run.
    """
    path, args = pathlib.Path(path), model.args
    rolls = args.sliding_window is not None and args.sliding_window < args.max_seq_len
    context, stride = _numbers(args.max_seq_len, rolls, context, stride)
    saved = _State(pathlib.Path(state), _identity(model, tokenizer, path, context, stride)) if state else None
    run = (saved and saved.load()) or _Run([tokenizer.start_id] if rolls else [])
    digest = hashlib.sha256()
    with path.open("rb") as file, torch.inference_mode():
        _read_again(file, run, digest, state)
        steps = _Rolling(model, run) if rolls else _Sliding(model, run, tokenizer.start_id, context, stride)
        for ids in _token_blocks(file, tokenizer, digest):
            run.pending += ids
            run.read, run.digest = file.tell(), digest.hexdigest()
            while steps.ready():
                steps.step()
                if saved and time.monotonic() >= saved.due:
                    steps.keep()
                    saved.write(run)
            progress(run.read)
        steps.finish()
    if not run.tokens:
        raise EvaluationError("this text has no tokens to predict", field="text", place=path)
    if saved:
        saved.path.unlink(missing_ok=True)
    return Perplexity(run.tokens, run.nats, run.read)


class _Rolling:
    """One pass in steps of CHUNK tokens over a ring of the window."""

    def __init__(self, model: Mistral7B, run: _Run) -> None:
        self.model, self.run = model, run
        self.cache = model.rolling_cache()
        if run.ring:
            for t, kept in zip(_tensors(self.cache), run.ring, strict=True):
                t.copy_(kept)

    def ready(self) -> bool:
        return len(self.run.pending) > CHUNK

    def step(self) -> None:
        run, device = self.run, self.model.norm.weight.device
        part = torch.tensor(run.pending[: CHUNK + 1], device=device)
        _add(run, self.model, self.model.hidden(part[None, :-1], self.cache)[0], part[1:])
        del run.pending[:CHUNK]

    def keep(self) -> None:
        """Put into the run what a continued one needs beside its tokens."""
        self.run.ring = _tensors(self.cache)

    def finish(self) -> None:
        """Compute the last tokens."""
        while len(self.run.pending) > 1:
            self.step()


class _Sliding:
    """Contexts of `context` tokens, which move by `stride`; the pending tokens begin with the next context."""

    def __init__(self, model: Mistral7B, run: _Run, start_id: int, context: int, stride: int) -> None:
        self.model, self.run, self.start_id, self.context, self.stride = model, run, start_id, context, stride

    def ready(self) -> bool:
        return len(self.run.pending) >= self.context

    def step(self) -> None:
        """Predict the tokens of the next context that were not predicted yet."""
        run = self.run
        inside = run.pending[: self.context]
        left = run.seen  # targets that were predicted before
        for hidden, targets in scored(self.model, [self.start_id, *inside]):
            skip = min(left, len(targets))
            left -= skip
            if skip < len(targets):
                _add(run, self.model, hidden[skip:], targets[skip:])
        run.seen = self.context - self.stride
        del run.pending[: self.stride]

    def keep(self) -> None:
        """Nothing beside the tokens is needed."""

    def finish(self) -> None:
        """Predict the last tokens, fewer than a stride."""
        while self.ready():
            self.step()
        if len(self.run.pending) > self.run.seen:
            self.step()


def _add(run: _Run, model: Mistral7B, hidden: Tensor, targets: Tensor) -> None:
    """Add the nats of targets (t,) after hidden (t, D)."""
    run.nats += F.cross_entropy(model.logits(hidden), targets, reduction="sum").item()
    run.tokens += len(targets)


def _tensors(cache: RollingCache) -> list[Tensor]:
    """All that a ring holds."""
    return [cache.positions, cache.length, cache.end, *(t for layer in cache.layers for t in layer.entries)]


def _numbers(longest: int, rolls: bool, context: int | None, stride: int | None) -> tuple[int, int]:
    """N and S. EvaluationError if they are out of range, or given for a model with a window."""
    if rolls:
        for name, value in (("context", context), ("stride", stride)):
            if value is not None:
                raise EvaluationError(
                    f"--{name} is for models without a window: with one, a single pass is exact",
                    field=name,
                    hint=f"omit --{name}",
                )
        return longest, longest
    context = longest if context is None else context
    if not 2 <= context <= longest:
        raise EvaluationError(f"--context must be between 2 and {longest}, not {context}", field="context")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise EvaluationError(
            f"--stride must be between 1 and the context, {context}, not {stride}", field="stride"
        )
    return context, stride


# ---------------------------------------------------------------------- the text


def _token_blocks(file: BinaryIO, tokenizer: Tokenizer, digest: hashlib._Hash) -> Iterator[list[int]]:
    """Token ids of the rest of a file, block by block; `digest` takes the bytes of each."""
    while data := file.read(BLOCK):
        begin = file.tell() - len(data)
        while (end := _cut(data)) is None and len(data) < LONGEST and (more := file.read(BLOCK)):
            data += more
        if end is None:
            end = len(data)
            if end >= LONGEST:  # before the last character, which may be cut
                end -= next((i for i in range(1, 5) if data[-i] & 0xC0 != 0x80), 0)
        file.seek(begin + end)
        data = data[:end]
        digest.update(data)
        yield _encode(data, begin, tokenizer, file.name)


def _cut(data: bytes) -> int | None:
    """Where the last line ends that ends in an ASCII letter or digit; None if there is none."""
    found = None
    end = len(data)
    while found is None and (at := data.rfind(b"\n", 1, end)) > 0:
        found = at if data[at - 1 : at].isalnum() else None
        end = at
    return found


def _encode(data: bytes, begin: int, tokenizer: Tokenizer, place: str) -> list[int]:
    """Ids of a block; not the first one continues a text, so that SentencePiece's first space is no part of it."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise EvaluationError(f"not UTF-8 text (byte {begin + error.start})", field="text", place=place) from error
    ids = tokenizer.encode(text, bos=False)
    first = tokenizer.surface(ids[0]) if begin and ids and tokenizer.vocabulary.drops_first_space else None
    return ids[1:] if first == SPACE else ids


# ---------------------------------------------------------------------- the state


def _identity(
    model: Mistral7B, tokenizer: Tokenizer, path: pathlib.Path, context: int, stride: int
) -> dict[str, object]:
    """What must be equal for a run to continue with equal bits."""
    return {
        "version": __version__, "torch": str(torch.__version__), "threads": torch.get_num_threads(),
        "model": repr(model.args), "weights": weights_of(model), "tokenizer": tokenizer.vocab_size,
        "size of the text": path.stat().st_size, "context": context, "stride": stride, "step": CHUNK,
    }  # fmt: skip


class _State:
    """A run in a file, beside what identifies it."""

    def __init__(self, path: pathlib.Path, identity: dict[str, object]) -> None:
        self.path, self.identity = path.expanduser(), identity
        self.due = time.monotonic() + SAVE_EVERY

    def write(self, run: _Run) -> None:
        """Replace the file by this state, or leave it as it was. WriteError if the disk is full."""
        with atomic_write(self.path) as temporary, temporary.open("wb") as file:
            torch.save({"identity": self.identity, **vars(run)}, file)
        self.due = time.monotonic() + SAVE_EVERY

    def load(self) -> _Run | None:
        """The run in the file; None if there is no file. EvaluationError for that of another run."""
        if not self.path.exists():
            return None
        try:
            found: dict[str, Any] = torch.load(self.path, weights_only=True)
            identity = found.pop("identity")
            run = _Run(**found)
        except Exception as error:  # a damaged pickle can raise anything
            raise EvaluationError("this is no state of an evaluation", field="state", place=self.path) from error
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise _other(self.path, name)
        return run


def _read_again(file: BinaryIO, run: _Run, digest: hashlib._Hash, state: str | os.PathLike[str] | None) -> None:
    """Read what a run has read, to its end. EvaluationError if the text has changed."""
    left = run.read
    while left and (data := file.read(min(left, LONGEST))):
        digest.update(data)
        left -= len(data)
    if left or (run.digest and digest.hexdigest() != run.digest):
        raise _other(state, "text")


def _other(state: str | os.PathLike[str] | None, what: str) -> EvaluationError:
    return EvaluationError(
        f"this state belongs to another evaluation: its {what} differs", field="state", place=state,
        hint="remove the file to begin again, or name another",
    )  # fmt: skip
