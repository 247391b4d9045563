"""Stop texts, against their plain definition."""

from __future__ import annotations

import itertools

from example_counts import MANY
from hypothesis import given
from hypothesis import strategies as st
from waiting import soon

from mistral_7b.engine.completion import StopStrings


def plain(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None, str]:
    """What each piece makes certain, the stop that is found, and what is still held back."""
    out, text, given_out = [], "", 0
    for piece in pieces:
        text += piece
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        if found:
            place, stop = min(found)
            return [*out, text[given_out:place]], stop, ""
        held = max(n for n in range(len(text) + 1) for stop in stops if n == 0 or stop.startswith(text[-n:]))
        out.append(text[given_out : len(text) - held])
        given_out = len(text) - held
    return out, None, text[given_out:]


@MANY
@given(
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3), st.lists(st.text("abc", max_size=7))
)
def test_they_do_what_they_are_defined_to(stops: list[str], pieces: list[str]) -> None:
    s, out = StopStrings(stops), []
    for piece in pieces:
        out.append(s.push(piece))
        if s.found is not None:
            break
    assert (out, s.found, s.flush()) == plain(stops, pieces)
    assert s.flush() == ""


def test_they_are_found_however_text_is_cut():
    text, stops = "aabaabaaab", ["aaab", "baaa"]
    for mask in range(2 ** (len(text) - 1)):
        cuts = [0, *[i + 1 for i in range(len(text) - 1) if mask >> i & 1], len(text)]
        s, out = StopStrings(stops), ""
        for a, b in itertools.pairwise(cuts):
            if s.found is None:
                out += s.push(text[a:b])
        assert (out, s.found) == ("aabaa", "baaa")
    s = StopStrings(["abc"])
    assert [s.push(t) for t in ("xa", "b", "ab", "d", "a")] == ["x", "", "ab", "abd", ""]
    assert s.flush() == "a"


def test_what_was_flushed_begins_no_stop():
    s = StopStrings(["ab"])
    assert (s.push("a"), s.flush(), s.push("b")) == ("", "a", "b")
    assert s.found is None


def test_a_long_one_takes_time_in_proportion():
    """The plain definition compares 300,000 texts of up to 300,000 characters here, nearly to their ends."""
    half = "a" * 300_000

    def searched() -> None:
        s = StopStrings([half + "b"])
        assert s.push(half) == ""
        assert s.push("ca") == half + "c"
        assert s.push(half + "b") == "a"
        assert s.found == half + "b"

    soon(1, searched)
