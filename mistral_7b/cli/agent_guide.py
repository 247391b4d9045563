"""`mistral-7b agent-guide`: print the page for coding assistants, agent_guide.md."""

from __future__ import annotations

import dataclasses
import pathlib

from .inputs import read_flags

PAGE = pathlib.Path(__file__).with_name("agent_guide.md")


@dataclasses.dataclass(frozen=True)
class AgentGuide:
    """Print one page on this package for a coding assistant: the API by example, the traps, the commands."""


def run(argv: list[str]) -> int:
    read_flags(AgentGuide, "agent-guide", argv)
    print(PAGE.read_text(encoding="utf-8"), end="")
    return 0
