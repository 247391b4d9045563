"""What a completion must obey: the form of its text, tools that it must call, or either.

Only data, which travels to the process that compiles it: reading a schema can cost as much as compiling it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...errors import GrammarError
from ...sampling.params import StructuredOutputs
from .lark import check_tools, lark, or_tools, tool_spec

FREE = ("auto", "none")  # values of tool_choice with which a model need not call


@dataclass(frozen=True)
class GrammarSpec:
    """The form of a text, and tools with OpenAI's `tool_choice` and `parallel_tool_calls`.

    With both a form and tools, the completion either has this form or calls tools.
    """

    structured: StructuredOutputs | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    choice: str | Mapping[str, Any] = "auto"
    parallel: bool = True

    @classmethod
    def of(
        cls, structured: StructuredOutputs | None, tools: Sequence[Mapping[str, Any]] = (),
        choice: str | Mapping[str, Any] = "auto", parallel: bool = True,
    ) -> GrammarSpec | None:  # fmt: skip
        """What a request asks for; None where any text will do. GrammarError for tools that are none."""
        check_tools(tools)
        if structured is None and choice in FREE:
            return None
        return cls(structured, () if choice == "none" else tuple(tools), choice, parallel)

    def lark(self, spaced: bool) -> str:
        """The grammar in Lark's notation; `spaced` as in lark.lark. GrammarError for what is no grammar."""
        spec = tool_spec(self.tools, self.choice, self.parallel) or self.structured
        assert spec is not None  # or `of` had returned None
        if self.structured is not None and self.tools:
            spec = or_tools(spec, self.tools, self.parallel, spaced)
        return lark(spec, spaced, own=spec is self.structured)

    def to_json(self) -> str:
        """As text; equal specifications have equal texts. GrammarError for what cannot be written as JSON."""
        given = {f.name: getattr(self.structured, f.name, None) for f in fields(StructuredOutputs)}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        values = {"structured_outputs": given, "tools": list(self.tools), "tool_choice": self.choice}
        written = []
        for name, value in values.items():
            try:
                written.append(json.dumps(value))
            except (TypeError, ValueError, RecursionError) as e:
                raise GrammarError(f"{name} cannot be written as JSON: {e}", field=name) from e
        return f"[{', '.join(written)}, {json.dumps(self.parallel)}]"

    @classmethod
    def from_json(cls, text: str) -> GrammarSpec:
        """What `to_json` wrote."""
        given, tools, choice, parallel = json.loads(text)
        return cls(StructuredOutputs(**given) if given else None, tools, choice, parallel)
