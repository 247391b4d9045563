"""The text that is read where none is named: technical English that every Python has, with examples of code."""

from __future__ import annotations

import importlib
import platform


def default_text() -> tuple[str, str]:
    """Return name and content of the default text: the topics of Python's `help()`, sorted by name."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    return name, "\n".join(topics[topic] for topic in sorted(topics))
