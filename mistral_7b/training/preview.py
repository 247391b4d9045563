"""Examples of data as the model sees them: which tokens are trained, and the control tokens among them.

    <s>[INST] Hi[/INST]« Hello</s>»

On a terminal trained tokens are green, others gray, and control tokens are underlined. Where there is no color,
« » enclose what is trained, and a control token is written ⟨</s>⟩, which tells it from text that spells one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..text.tokenizer import Tokenizer
from .encoding import Encoded, Item, Pair, Prompt, Thumb

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

ESCAPED = {
    c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"
}  # would steer a terminal
TRAINED, OTHER, CONTROL = "bold green", "bright_black", "underline"


class Run(NamedTuple):
    """Neighboring tokens of one kind, as one text: a control token is a run of its own."""

    text: str
    trained: bool
    control: bool


def preview(items: Sequence[Item], tokenizer: Tokenizer, n: int, console: Console | None = None) -> None:
    """Print the first `n` items with their trained tokens marked, and a legend. `console` None is stdout."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    color = console.color_system is not None
    for i, item in enumerate(items[:n]):
        for title, document in _parts(item):
            count = f"{len(document.ids):,} tokens, {int(document.trained.sum()):,} trained"
            console.print(Text(f"── {i + 1}{title}: {count}", style="bold"))
            console.print(styled(document, tokenizer, color), soft_wrap=not color, end="\n\n")
    if color:
        parts = (("trained", TRAINED), "  ", ("not trained", OTHER), "  ", ("control token", CONTROL))
        console.print(Text.assemble(*parts))
    else:
        console.print(Text("«trained»  not trained  ⟨control token⟩"))


def styled(document: Encoded, tokenizer: Tokenizer, color: bool) -> Text:
    """Return a document with its trained tokens in color, or, without color, between « and »."""
    from rich.text import Text

    text = Text()
    for trained, group in groupby(runs(document, tokenizer), lambda run: run.trained):
        text.append("«" if trained and not color else "")
        for run in group:
            style = f"{TRAINED if trained else OTHER}{' ' + CONTROL if run.control else ''}"
            text.append(run.text if color or not run.control else f"⟨{run.text}⟩", style if color else None)
        text.append("»" if trained and not color else "")
    return text


def runs(document: Encoded, tokenizer: Tokenizer) -> Iterator[Run]:
    """Yield the runs of a document.

    Bytes of a character that spans two runs become U+FFFD; codes that would steer a terminal are spelled out.
    """

    def kind(token: tuple[int, bool]) -> tuple[bool, bool, int]:
        control = tokenizer.is_control(token[0])
        return token[1], control, token[0] if control else -1

    tokens = zip(document.ids.tolist(), document.trained.tolist(), strict=True)
    for (trained, control, _), group in groupby(tokens, kind):
        ids = [token for token, _ in group]
        if control:
            yield from (Run(tokenizer.piece(i), trained, True) for i in ids)
        else:
            text = b"".join(map(tokenizer.piece_bytes, ids)).decode(errors="replace")
            yield Run(text.translate(ESCAPED), trained, False)


def _parts(item: Item) -> list[tuple[str, Encoded]]:
    """Return the documents of an item, each with what it is."""
    if isinstance(item, Pair):
        return [(", chosen", item.chosen), (", rejected", item.rejected)]
    if isinstance(item, Thumb):
        return [(", good" if item.good else ", bad", item.answer)]
    if isinstance(item, Prompt):
        return [(", prompt", Encoded(item.ids, np.zeros(len(item.ids), bool)))]
    return [("", item)]
