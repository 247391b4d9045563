"""The text that is read where none is named."""

from __future__ import annotations

import pydoc_data.topics

from mistral_7b.text.default_text import default_text


def test_it_is_all_of_pythons_help_in_an_order_of_its_own() -> None:
    name, text = default_text()
    topics = pydoc_data.topics.topics
    assert name.startswith("pydoc_data.topics of Python 3.")
    places = [text.index(topics[topic]) for topic in sorted(topics)]
    assert len(places) > 50
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1
    assert default_text() == (name, text)
    reordered = dict(reversed(topics.items()))
    pydoc_data.topics.topics, kept = reordered, topics
    try:
        assert default_text() == (name, text)
    finally:
        pydoc_data.topics.topics = kept
