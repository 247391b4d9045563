"""A prompt of a picture: its token ids, how they are displayed, and the token that a picture is about."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InterpretError
from ...model import Mistral7B
from ...text.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # a text, or token ids


def encode(model: Mistral7B, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt. InterpretError if it has none, or more than the context holds."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    args = model.args
    if not ids:
        raise InterpretError("the prompt has no tokens", field="prompt")
    if wrong := [i for i in ids if not 0 <= i < args.vocab_size]:
        raise InterpretError(f"there is no token {wrong[0]}: the vocabulary has {args.vocab_size}", field="prompt")
    if args.sliding_window is None and len(ids) > args.max_seq_len:
        raise InterpretError(
            f"the prompt has {len(ids)} tokens, and the context {args.max_seq_len}",
            field="prompt",
            hint="shorten it",
        )
    return ids


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each id as it is displayed: " the", "[INST]", "<0xE2>"."""
    return [tokenizer.piece(i) for i in ids]


def layers_of(model: Mistral7B, layers: Sequence[int] | None) -> list[int]:
    """The layers of a picture, None being all. InterpretError for one that is not there."""
    n = model.args.n_layers
    found = range(n) if layers is None else layers
    if wrong := [layer for layer in found if not -n <= layer < n]:
        raise InterpretError(f"there is no layer {wrong[0]}: the model has 0 to {n - 1}", field="layers")
    return sorted({layer % n for layer in found})


def one_token(tokenizer: Tokenizer, text: str, after: Prompt) -> int:
    """The token that `text` is, after a prompt. InterpretError if it is several, or none."""
    if isinstance(after, str):
        before, both = tokenizer.encode(after), tokenizer.encode(after + text)
        if len(both) == len(before) + 1 and both[:-1] == before:
            return both[-1]
    ids = tokenizer.encode(text, bos=False)
    if len(ids) == 1:
        return ids[0]
    parts = ", ".join(repr(tokenizer.piece(i)) for i in ids)
    raise InterpretError(f"{text!r} is not one token here, but {parts or 'none'}", field="target")
