r"""Lark terminals of JSON strings: lengths, formats, and ECMA-262 patterns, over the text as JSON encodes it.

Every character has exactly one encoding here: itself, or the shortest escape if JSON requires one. So a text
matches a terminal exactly if its decoded string does, and terminals can be intersected (&) and complemented (~).
"""

from __future__ import annotations

import functools
import json
from typing import Any

from ...errors import GrammarError
from .patterns import CHAR, escape, to_json_regex
from .vocabulary import import_llguidance

STRING = f"/\\x22{CHAR}*\\x22/"

HOUR = r"([01][0-9]|2[0-3])"
TIME = rf"{HOUR}:[0-5][0-9]:[0-5][0-9](\.[0-9]+)?([zZ]|[+-]{HOUR}:[0-5][0-9])"
LEAP = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][48]|[2468]0|[13579][26])00)"
DAY = r"(0[1-9]|1[0-9]|2[0-8])"
DATE = (
    rf"([0-9]{{3}}[1-9]|[0-9]{{2}}[1-9]0|[0-9][1-9]00|[1-9]000)"
    rf"-((0[1-9]|1[0-2])-{DAY}|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)|{LEAP}-02-29"
)
WEEKS = r"[0-9]+W|T([0-9]+H([0-9]+M([0-9]+S)?)?|[0-9]+M([0-9]+S)?|[0-9]+S)"
DAYS = r"([0-9]+Y([0-9]+M([0-9]+D)?)?|[0-9]+M([0-9]+D)?|[0-9]+D)"
LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"({BYTE}\.){{3}}{BYTE}"
H16 = "[0-9a-fA-F]{1,4}"
IPV6 = "|".join(
    [f"({H16}:){{7}}{H16}", f"::({H16}:){{0,6}}{H16}", "::"]
    + [f"({H16}:){{{n}}}(:{H16}){{1,{7 - n}}}" for n in range(1, 7)]
    + [f"({H16}:){{7}}:", f"({H16}:){{1,6}}:"]
)
ATOM = r"[a-zA-Z0-9!#$%&'*+\x2f=?^_`{|}~-]+"
URI_CHAR = r"([a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
AUTHORITY = (
    rf"(([a-zA-Z0-9._~!$&'()*+,;=:-]|%[0-9a-fA-F]{{2}})*@)?"
    rf"(\[({IPV6})\]|([a-zA-Z0-9._~!$&'()*+,;=-]|%[0-9a-fA-F]{{2}})*)(:[0-9]*)?"
)
PATH = rf"\x2f\x2f{AUTHORITY}(\x2f{URI_CHAR}*)*|\x2f?({URI_CHAR}+(\x2f{URI_CHAR}*)*)?"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"({DATE})[tT]{TIME}",
    "duration": f"P({WEEKS}|{DAYS}(T([0-9]+H([0-9]+M([0-9]+S)?)?|[0-9]+M([0-9]+S)?|[0-9]+S))?)",
    "email": rf"{ATOM}(\.{ATOM})*@{LABEL}(\.{LABEL})*",
    "hostname": rf"{LABEL}(\.{LABEL})*",
    "ipv4": IPV4,
    "ipv6": IPV6,
    "uuid": r"[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "uri": rf"[a-zA-Z][a-zA-Z0-9+.-]*:({PATH})(\?({URI_CHAR}|[\x2f?])*)?(#({URI_CHAR}|[\x2f?])*)?",
}  # all match only characters that JSON does not escape
LENGTHS = {"hostname": ".{1,253}", "email": "[^@]{1,64}@.{1,253}"}  # length limits in addition


NO_FORCING = '%llguidance {"no_forcing": true}'


class TerminalError(GrammarError):
    """A terminal exceeds llguidance's limits; the caller adds the schema's place and TOO_LARGE."""


TOO_LARGE = "pattern, format and patternProperties are too large together"


def literal(text: str) -> str:
    """A Lark string literal that matches the JSON encoding of a text."""
    return json.dumps(_to_json(text))


def of_length(least: int, most: int | None) -> str:
    """A terminal of the strings with `least` to `most` characters."""
    return f"/\\x22{CHAR}{{{least},{'' if most is None else most}}}\\x22/" if least or most is not None else STRING


def of_format(name: str) -> str:
    """A terminal of the strings of a format in FORMATS."""
    terminal = f"/\\x22({FORMATS[name]})\\x22/"
    return f"{terminal} & /\\x22({LENGTHS[name]})\\x22/" if name in LENGTHS else terminal


def of_pattern(pattern: str) -> str:
    """A terminal of the strings that contain a match of a pattern. GrammarError as patterns.to_json_regex."""
    return f"/\\x22({to_json_regex(pattern)})\\x22/"


def matches(terminal: str, text: str) -> bool:
    """Whether a text matches a terminal of strings. Raises TerminalError."""
    matcher, written = _matcher(terminal).deep_copy(), _to_json(text).encode()
    return bool(matcher.try_consume_tokens(list(written)) == len(written) and matcher.is_accepting())


def is_empty(terminal: str) -> bool:
    """Whether no text matches a terminal of strings. Raises TerminalError."""
    return bool(_matcher(terminal).deep_copy().try_consume_tokens([ord('"')]) == 0)


def compile_error(value: str) -> str | None:
    """llguidance's error for the right-hand side of a rule, or None."""
    matcher = import_llguidance().LLMatcher(_tokenizer(), f"start: {value}\n{NO_FORCING}", log_level=0)
    return _error_line(matcher) if matcher.is_error() else None


def _error_line(matcher: Any) -> str:
    """The first line of llguidance's error report, without the excerpt of the grammar."""
    return str(matcher.get_error()).splitlines()[0]


def _to_json(text: str) -> str:
    """The JSON encoding of a text, with the shortest escapes and only where required."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", escape("\x7f"))


@functools.lru_cache(256)
def _matcher(terminal: str) -> Any:
    """llguidance's matcher of a terminal, over bytes. Raises TerminalError if it exceeds the limits."""
    matcher = import_llguidance().LLMatcher(_tokenizer(), f"start: T\nT: {terminal}\n{NO_FORCING}", log_level=0)
    if matcher.is_error():
        raise TerminalError(_error_line(matcher))
    return matcher


@functools.cache
def _tokenizer() -> Any:
    return import_llguidance().LLTokenizer(_ByteTokenizer())


class _ByteTokenizer:
    """The tokenizer interface that llguidance requires, with one token per byte."""

    is_tokenizer_wrapper = True
    special_token_ids = (256,)
    eos_token_id = bos_token_id = 256

    def __init__(self) -> None:
        self.tokens = [*(bytes([i]) for i in range(256)), b"</s>"]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
