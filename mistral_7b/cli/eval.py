"""`mistral-7b eval`: measure what a model knows: perplexity, tasks of lm-eval, retrieval over long contexts."""

from __future__ import annotations

import difflib
import importlib

from .flags import UsageError

KINDS = {
    "perplexity": "perplexity and bits per byte of a text file of any size",
    "harness": "tasks of lm-eval (the extra [eval])",
    "passkey": "retrieval of a number from a long text, by length and depth, as a heat map",
}


def run(argv: list[str]) -> int:
    kind = argv[0] if argv else ""
    if kind in KINDS:
        return importlib.import_module(f"..eval_{kind}", __name__).run(argv[1:])
    if kind in ("-h", "--help", "help"):
        print(help_text())
        return 0
    close = difflib.get_close_matches(kind, KINDS, n=1)
    raise UsageError(
        f"there is no evaluation {kind!r}" if kind else "name what to evaluate",
        field="eval",
        hint=f"did you mean {close[0]!r}?" if close else f"one of {', '.join(KINDS)}",
    )


def help_text() -> str:
    """Return the list of evaluations."""
    kinds = "\n".join(f"  {name:<12}{what}" for name, what in KINDS.items())
    return (
        "usage: mistral-7b eval [-h] KIND MODEL ...\n\nMeasure what a model knows.\n\n"
        f"kinds:\n{kinds}\n\n`mistral-7b eval KIND --help` lists the flags."
    )
