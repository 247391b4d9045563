"""Ollama's Modelfile for a GGUF file: where it lies, the chat template and the texts that end an answer.

Ollama's templates are Go's and are applied to one turn: system text, prompt and response. The turn is read off
what the model's own template encodes for a short conversation. Tools are not expressible in this way; a template
that is not the same for each turn is left out, and Ollama then takes that of the GGUF file, if it knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import TokenizerError
from .tokenizer import Tokenizer

MARKS = {"system": "Opalescent", "user": "Quicksilver", "assistant": "Ramification"}  # words no template contains
AGAIN = "Zephyrous"  # of a second user message


def modelfile(gguf: str, tokenizer: Tokenizer | None) -> str:
    """Return the text of a Modelfile beside the file `gguf`, of a model with this tokenizer."""
    lines = [f"FROM ./{gguf}"]
    if tokenizer is not None:
        template = turn_template(tokenizer)
        if template is None:
            lines.append("# no TEMPLATE: Ollama takes the file's own, if it knows it")
        else:
            lines.append(f'TEMPLATE """{template}"""')
        stops = [tokenizer.piece(i) for i in sorted(tokenizer.stop_ids)]
        lines += [f"PARAMETER stop {_quoted(text)}" for text in stops]
    return "\n".join(lines) + "\n"


def turn_template(tokenizer: Tokenizer) -> str | None:
    """Return the model's chat template as one of Ollama's for a turn; None if it cannot be expressed."""
    user, assistant, system = ({"role": role, "content": MARKS[role]} for role in ("user", "assistant", "system"))
    try:
        plain = _rendered(tokenizer, [user])
        longer = _rendered(tokenizer, [user, assistant, {"role": "user", "content": AGAIN}])
        before, after = _around(plain, MARKS["user"])
        _, rest = _around(longer, MARKS["assistant"])
        end, _ = _around(rest, AGAIN)
        head = (
            f"{{{{ if .System }}}}{_system(tokenizer, [system, user], after)}{{{{ else }}}}{before}{{{{ end }}}}"
        )
    except (TokenizerError, ValueError):
        return None
    if not end.endswith(before) or not longer.startswith(plain):  # the turns differ
        return None
    parts = (before, after, end)
    if any(sign in part for part in parts for sign in ("{{", "}}", '"""')):
        return None
    return f"{head}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end.removesuffix(before)}"


def _system(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], after: str) -> str:
    """The part of a turn before its prompt, with a system text. ValueError if it has no place for one."""
    before, rest = _around(_rendered(tokenizer, messages), MARKS["system"])
    between, end = _around(rest, MARKS["user"])
    if end != after:
        raise ValueError
    return f"{before}{{{{ .System }}}}{between}"


def _rendered(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text that llama.cpp encodes to the same ids.

    It adds BOS itself, and as SentencePiece does, a space before a text that follows a control token.
    """
    ids = tokenizer.encode_chat(messages)
    ids = ids[1:] if ids[:1] == [tokenizer.bos_id] else ids
    text, after_control = "", True
    for token in ids:
        piece = tokenizer.piece(token)
        text += piece.removeprefix(" ") if after_control and tokenizer.vocabulary.drops_first_space else piece
        after_control = tokenizer.is_control(token)
    return text


def _around(text: str, mark: str) -> tuple[str, str]:
    """The text before and after a mark. ValueError if it is not there just once."""
    before, after = text.split(mark)
    return before, after


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
