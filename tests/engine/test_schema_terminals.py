"""Terminals of strings and numbers, compared with Python's patterns, formats and numbers."""

from __future__ import annotations

import itertools
import random
import re
from fractions import Fraction

import pytest

from mistral_7b.engine.grammar import digits, strings
from mistral_7b.engine.grammar.digits import Bound
from mistral_7b.errors import GrammarError

PATTERNS = (
    "^a", "b$", "a|b", "^(a|b)$", "^a|b$", "(^|,)x(,|$)", "[^a]b", r"^\d{2,3}$", r"^\w+@\w+\.com$", "^$", "",
    "x{0,2}y", r"\\\"", r"^[\]\-a]+$", "[a-]", "^.$", r"\u00e9", r"^[^\x00-\x7F]+$", r"^\S+$", "(?:ab)+?c", "日.",
    '^["\\\\]{2}$', "/x/", r"^[\d,]+$", r"\D", r"a{2}|(b(c|d))", "(a$|b)$", r"[\n\t]", "{",
    "^(?:^a)", "^^b$$", "(^a|b)(c|$)",
)  # fmt: skip
TEXTS = (
    "", "a", "b", "ab", "ba", "x", ",x", "x,", "a,x,b", "12", "123", "1234", "a@b.com", "xxy", "y", '"', "\\",
    '\\"', '"\\', "é", "日本", "\n", "a\nb", "]-a", "-", "ac", "abc", "ababc", "c", "\x7f", "\x01", "/x/", "😀",
    "日😀", "/", "aa", "bc", "bd", "1,2", "a{", "\u2028",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_python(pattern: str) -> None:
    terminal = strings.of_pattern(pattern)
    python = re.compile(re.sub(r"(?<!\\)\$", r"\\Z", pattern), re.ASCII)
    found = {text for text in TEXTS if python.search(text)}
    if pattern in ("^.$", r"^\S+$"):
        found -= {"\u2028"}  # which ends a line in ECMA-262, and is a blank
    assert {text for text in TEXTS if strings.matches(terminal, text)} == found


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^\p{Lu}\p{P}$", ['É"', "A."], ['é"', "AA"]),
        (r"^\P{P}$", ["a", "\n"], ['"', "\\"]),
        (r"^[^\p{L}\n]$", ["1", "\t"], ["a", "\n"]),
        (r"^[\s\S]{2}$", ["\n\ufeff"], ["a"]),
        (r"^\ud83d\ude00\u{1F600}$", ["😀😀"], ["😀"]),
        (r"^\cJ\x41\t\0$", ["\nA\t\0"], ["JA\t\0"]),
        ("^[^]$", ["\n", "a"], ["", "ab"]),
        ("[]", [], ["", "a"]),
    ],
)
def test_patterns_that_differ_from_python(pattern: str, good: list[str], bad: list[str]) -> None:
    terminal = strings.of_pattern(pattern)
    assert [text for text in [*good, *bad] if strings.matches(terminal, text)] == good


@pytest.mark.wording
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?<!a)b", "look-around"), ("(?i)a", "flags"), ("(a", "unclosed group"), ("a)", "unexpected"),
        ("[a", "unclosed class"), (r"(a)\1", r"\\1 is not"), ("a**", "nothing to repeat"), ("*", "unexpected"),
        ("^*", "nothing to repeat"), ("x^y", "only at the ends"), ("(^a)*", "only at the ends"),
        ("[b-a]", "wrong order"),
        ("a{3,1}", "wrong order"), ("a{,3}", "write {0,n}"), (r"\p{Greek}", "general categories"),
        (r"[\d-z]", "range must start and end"), (r"\ud800", "not a character"), (r"a\b", r"\\b is not"),
        ("(" * 500 + ")" * 500, "nested too deeply"), ("\\", r"\\ is not"),
    ],
)  # fmt: skip
def test_invalid_patterns_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        strings.of_pattern(pattern)


FORMATS = {
    "date": (["2024-02-29", "2023-02-28", "2000-02-29", "0001-01-31", "2024-04-30"],
             ["2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31", "2024-13-01", "2024-00-10"]),
    "time": (["23:59:59Z", "00:00:00.12+01:00"], ["24:00:00Z", "00:00:00", "12:60:00Z"]),
    "date-time": (["2024-02-29T00:00:00Z", "2024-01-01t10:00:00.5-12:30"], ["2024-02-30T00:00:00Z", "2024-02-29"]),
    "duration": (["P1Y2M", "PT5M", "P3W", "P1DT1H", "PT1H2M3S"], ["P", "PT", "P1", "1Y", "P1DT"]),
    "email": (["a.b@c.de", "a@b"], ["a@", "@b", "a..b@c", "a" * 65 + "@b"]),
    "hostname": (["a-b.c", "A1"], ["-a", "a..b", "a" * 64, "a-.b", "a." * 127 + "a"]),
    "ipv4": (["255.0.10.1"], ["256.1.1.1", "01.1.1.1", "1.1.1"]),
    "ipv6": (["::", "::1", "1::", "1:2:3:4:5:6:7:8", "1::8", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8"],
             [":", "1:::2", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7", "::1::2", "1::2:3:4:5:6:7:8"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"]),
    "uri": (["http://a.b/c?d#e", "mailto:x@y", "urn:x:y", "http://[::1]:80/"], ["a", "//x", "http://a b", "1:x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", strings.FORMATS)
def test_formats_match_exactly_their_strings(name: str) -> None:
    good, bad = FORMATS[name]
    terminal = strings.of_format(name)
    assert [text for text in good if not strings.matches(terminal, text)] == []
    assert [text for text in bad if strings.matches(terminal, text)] == []


def test_empty_terminals_are_detected() -> None:
    one, other = strings.of_pattern("^a*b$"), strings.of_pattern("^a*c$")
    assert strings.is_empty(f"{one} & {other}")
    assert not strings.is_empty(one)
    assert not strings.is_empty(f"{one} & ~({strings.literal('b')})")
    assert strings.is_empty(f"{one} & {strings.of_length(1, 1)} & ~({strings.literal('b')})")


def _matches(terminal: str, text: str) -> bool:
    """Whether a text matches a terminal of only regexes, "&", "|", parentheses and "-"."""
    negative = re.fullmatch(r'(?:\((.*)\) \| )?"-" \((.*)\)', terminal) or re.fullmatch(r"\((.*)\)()", terminal)
    if terminal.startswith("/"):
        return re.fullmatch(terminal[1:-1], text) is not None
    assert negative
    regexes = negative[2] if text.startswith("-") else negative[1]
    return bool(regexes) and all(re.fullmatch(r[1:-1], text.lstrip("-")) for r in regexes.split(" & "))


def test_integers_between_bounds() -> None:
    chance = random.Random(1)
    for _ in range(400):
        size = chance.choice([2, 4, 20, 40])
        low, high = sorted(chance.randint(-(10**size), 10**size) for _ in range(2))
        near = {low, high, low - 1, low + 1, high - 1, high + 1, 0, -1, 1, chance.randint(low, high)}
        for least, most in itertools.product((low, None), (high, None)):
            terminal = digits.integers(least, most)
            for value in near:
                inside = (least is None or value >= least) and (most is None or value <= most)
                assert _matches(terminal, str(value)) == inside, (least, most, value)


def test_decimals_between_bounds() -> None:
    chance = random.Random(2)

    def number() -> Fraction:
        return Fraction(
            chance.choice([chance.randint(-300, 300), chance.randint(-3, 3)]), 10 ** chance.randint(0, 3)
        )

    for _ in range(500):
        low, high = sorted((number(), number()))
        least = Bound(low, chance.random() < 0.5) if chance.random() < 0.8 else None
        most = Bound(high, chance.random() < 0.5) if chance.random() < 0.8 or least is None else None
        if low == high and least and most and (least.open or most.open):
            continue
        terminal = digits.decimals(least, most)
        for value in (low, high, low - Fraction(1, 1000), high + Fraction(1, 1000), number(), number()):
            above = least is None or (value > low if least.open else value >= low)
            below = most is None or (value < high if most.open else value <= high)
            text = digits.format_decimal(value)
            zeros = text + ("" if "." in text else ".") + "0" * chance.randint(1, 2)
            assert _matches(terminal, text) == _matches(terminal, zeros) == (above and below), (least, most, text)
