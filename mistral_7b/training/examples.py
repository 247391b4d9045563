"""Files of data -> items to train on, all of it checked before anything trains.

    a.jsonl       one JSON object a line; a file that begins with "[" is one list of objects
    a.txt         one plain text, one document
    FILE:2.5      with a sampling weight

The form of a file's rows is recognised by their keys (forms.py) and is one for the whole file. Every bad line is
found, with its number and the reason, before the one error that lists them.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import TokenizerError, TrainingError
from ..text.template_choice import no_template
from ..text.template_marks import strings_of
from ..text.tokenizer import Tokenizer
from .encoding import Encoded, Encoder, Item, Pair, Prompt, Thumb
from .forms import Chat, Form, Judged, Preference, Sample, form_of

SHOWN = 20  # reasons for bad lines that an error lists, with their files
NUMBERS = 5  # lines that it lists for each
NUMBERED = re.compile(r"(.*:|.*: item )(\d+)", re.DOTALL)  # the place of a line, or of an item of a list
HEAVIEST = 1000  # weight of a file: with more the others are never seen
HEAD = 4096  # bytes in which a file's first character is looked for


class BadLine(NamedTuple):
    """A line that cannot be used: `place` is FILE:LINE."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class Source:
    """What was read from one file.

    form      the form of its rows
    rows      rows that became items
    items     items of them: more than rows if texts are cut, or chats stand in several documents
    tokens    of all items; `trained` of them have a loss
    stopped   rows with a trained token that ends an answer
    bad       the lines that were left out
    """

    path: str
    weight: float = 1.0
    form: str = ""
    rows: int = 0
    items: int = 0
    tokens: int = 0
    trained: int = 0
    stopped: int = 0
    bad: list[BadLine] = field(default_factory=list)

    def __str__(self) -> str:
        said = f"{self.path}: {self.rows:,} {'row' if self.rows == 1 else 'rows'} of the form {self.form}"
        if self.items != self.rows:
            said += f" in {self.items:,} documents"
        said += f", {self.tokens:,} tokens"
        if self.trained:
            said += f", {self.trained:,} of them trained"
        return said + (f"; {len(self.bad):,} bad lines left out" if self.bad else "")


@dataclass(frozen=True)
class Data:
    """Items to train on: of type Encoded, Pair, Thumb or Prompt, by the method.

    items      all items, in the order of the sources and of their lines
    source_of  (N,) int32: the source of each item
    weights    the sampling weight of each source
    report     what each source held
    """

    items: list[Any]
    source_of: np.ndarray
    weights: tuple[float, ...]
    report: tuple[Source, ...]


def read_data(
    sources: Sequence[str], tokenizer: Tokenizer, method: str, seq_len: int, *, skip_bad: bool = False
) -> Data:
    """Read, check and encode the files of `sources`, "FILE" or "FILE:weight", for a method of training.

    The items are Encoded for "lora", "qlora" and "full", Pair for "dpo", Thumb for "kto", Prompt for "grpo". No
    document has more than `seq_len` tokens: plain texts are cut, other rows that are longer are bad lines.

    Raises TrainingError for files that cannot be read, for bad lines (with `skip_bad` they are left out and stand
    in the report), and for data in which nothing, or no answer's end, is trained.
    """
    if not sources:
        raise TrainingError("there are no files of data", field="data")
    encoder = Encoder(tokenizer, seq_len)
    items: list[Item] = []
    report: list[Source] = []
    for named in sources:
        source = _source(named)
        items += _items(source, encoder, method)
        report.append(source)
    bad = [line for source in report for line in source.bad]
    if bad and not skip_bad:
        raise _bad_lines(bad)
    _check_trained(report, method, tokenizer)
    source_of = np.repeat(np.arange(len(report), dtype=np.int32), [source.items for source in report])
    return Data(items, source_of, tuple(source.weight for source in report), tuple(report))


def _source(named: str) -> Source:
    """Return the file and the weight of "FILE" or "FILE:weight"; a file whose name has a colon is a file."""
    if not named:
        raise TrainingError("a file of data without a name", field="data")
    head, colon, tail = named.rpartition(":")
    if Path(named).exists() or not colon or not Path(head).exists():
        path, weight = named, 1.0
    else:
        path = head
        try:
            weight = float(tail)
        except ValueError:
            weight = math.nan
        if not 0 < weight <= HEAVIEST:
            raise TrainingError(
                f"the weight must be a number above 0 and at most {HEAVIEST}, not {tail!r}",
                field="data",
                place=path,
            )
    if not Path(path).exists():
        raise TrainingError("no such file", field="data", place=path)
    if Path(path).is_dir():
        raise TrainingError("is a folder", field="data", place=path, hint="name the files in it")
    return Source(path, weight)


def _items(source: Source, encoder: Encoder, method: str) -> Iterator[Item]:
    """Yield the items of a file, and count them and its bad lines in `source`."""
    form: Form | None = None
    for place, row in _rows(Path(source.path)):
        try:
            if isinstance(row, TrainingError):
                raise row
            found = form_of(row, method)
            form = form or found
            if found is not form:
                raise TrainingError(f"is of the form {found.name}, and the lines before it are {form.name}")
            form.check_keys(row)
            sample = form.read(row)
            if encoder.tokenizer.chat is None and _has_messages(sample):
                raise _NoTemplateError
            items = encoder.encode(sample)
        except (TrainingError, TokenizerError) as e:
            source.bad.append(BadLine(place, e.message))
            continue
        except _NoTemplateError:
            raise no_template(encoder.tokenizer.path.parent) from None
        source.form = form.name
        _count(source, items, encoder.tokenizer.stop_ids)
        yield from items


class _NoTemplateError(Exception):
    """Raised for a chat and a model without a template, which is no fault of a line."""


def _has_messages(sample: Sample) -> bool:
    if isinstance(sample, Preference):
        return _has_messages(sample.chosen)
    return isinstance(sample.answer if isinstance(sample, Judged) else getattr(sample, "prompt", sample), Chat)


def _count(source: Source, items: Sequence[Item], stops: frozenset[int]) -> None:
    source.rows += 1
    source.items += len(items)
    ends = False
    for item in items:
        if isinstance(item, Prompt):
            source.tokens += len(item.ids)
            continue
        for ids, trained in _documents_of(item):
            targets = ids[trained].tolist()
            source.tokens += len(ids)
            source.trained += len(targets)
            ends = ends or not stops.isdisjoint(targets)
    source.stopped += ends


def _documents_of(item: Encoded | Pair | Thumb) -> Sequence[Encoded]:
    if isinstance(item, Pair):
        return item
    return [item.answer] if isinstance(item, Thumb) else [item]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a file; the row is a TrainingError where there is none to read."""
    try:
        with path.open("rb") as file:
            if (head := file.read(4)).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise TrainingError("is UTF-16", field="data", place=path, hint="save it as UTF-8")
            if head == b"PAR1":
                raise TrainingError(
                    "is a Parquet file, which is not read: write it as JSON lines, as pandas does with "
                    'to_json(path, orient="records", lines=True)',
                    field="data",
                    place=path,
                )
            file.seek(0)
            if path.suffix == ".txt":
                yield str(path), _parsed(file.read(), lambda text: {"text": text})
                return
            begun = file.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            if begun.startswith(b"["):
                listed = _parsed(file.read(), _json)
                if isinstance(listed, TrainingError):
                    yield str(path), listed
                else:
                    yield from ((f"{path}: item {n}", row) for n, row in enumerate(listed, 1))
                return
            for n, line in enumerate(map(bytes.strip, file), 1):
                if line:
                    yield f"{path}:{n}", _parsed(line, _json)
    except OSError as e:
        raise TrainingError(f"cannot be read: {e.strerror}", field="data", place=path) from e


def _parsed(raw: bytes, parse: Callable[[str], Any]) -> Any:
    """Return what `parse` makes of a text, or the TrainingError that says why there is nothing."""
    try:
        return parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        return TrainingError(f"is not UTF-8 ({e.reason} at byte {e.start})")
    except RecursionError:
        return TrainingError("is nested too deeply")
    except json.JSONDecodeError as e:
        line = f"line {e.lineno}, " if e.lineno > 1 else ""
        return TrainingError(f"is not JSON: {e.msg} ({line}column {e.colno})")
    except ValueError as e:
        return TrainingError(f"is not JSON: {e}")


def _json(text: str) -> Any:
    """Parse JSON. ValueError for what is none, NaN and infinities too, and for halves of characters."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no value of it")

    value = json.loads(text, parse_constant=refuse)
    if "\\u" in text:  # the only way to a surrogate without its other half
        for string in strings_of(value):
            string.encode()
    return value


def _bad_lines(bad: Sequence[BadLine]) -> TrainingError:
    groups: dict[tuple[str, str], list[str]] = {}  # numbers of lines, by file and reason
    for place, reason in bad:
        numbered = NUMBERED.fullmatch(place)
        where, number = numbered.groups() if numbered else (place, "")
        groups.setdefault((where, reason), []).append(number)
    shown = "".join(f"\n  {where}{_listed(n)}: {reason}" for (where, reason), n in list(groups.items())[:SHOWN])
    left = sum(map(len, list(groups.values())[SHOWN:]))
    rest = f"\n  and {left:,} lines more" if left else ""
    count = "1 line" if len(bad) == 1 else f"{len(bad):,} lines"
    return TrainingError(
        f"{count} of the data cannot be used:{shown}{rest}\n",
        field="data",
        hint="correct them, or leave them out with --skip-bad (skip_bad=True)",
    )


def _listed(numbers: Sequence[str]) -> str:
    """Numbers of lines: "3", "3, 7 and 12", "3, 7, 12, 20, 31 and 40 more"."""
    *first, last = numbers if len(numbers) <= NUMBERS else [*numbers[:NUMBERS], f"{len(numbers) - NUMBERS:,} more"]
    return f"{', '.join(first)} and {last}" if first else last


def _check_trained(report: Sequence[Source], method: str, tokenizer: Tokenizer) -> None:
    """Raise TrainingError for a file without a row that can be used, and for data that teaches no answer's end."""
    for source in report:
        if not source.rows:
            why = f": all {len(source.bad):,} lines are bad ({source.bad[0]})" if source.bad else ""
            raise TrainingError(f"holds nothing to train on{why}", field="data", place=source.path)
    if method == "grpo":
        return
    if not any(source.trained for source in report):
        raise TrainingError("no token of the data is trained", field="data")
    answers = [source for source in report if source.form != "text"]
    if answers and not any(source.stopped for source in answers):
        raise TrainingError(
            "no answer's end is trained, so that the model would not learn to stop: the chat template ends an "
            "answer with none of the tokens that end a generation",
            field="chat_template",
            place=tokenizer.chat.name if tokenizer.chat else tokenizer.path,
            hint="choose another template with --chat-template",
        )
