"""The constraints on a completion: structured outputs, tool calls, or either.

Only data, which is sent to the process that compiles it: parsing a schema can cost as much as compiling it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from ...errors import GrammarError
from ...sampling.params import StructuredOutputs
from ...text.tool_calls import ToolSyntax
from .lark import MISTRAL, check_tools, lark, tool_spec, with_tools

OPTIONAL_CHOICES = ("auto", "none")  # values of tool_choice that require no call


@dataclass(frozen=True)
class GrammarSpec:
    """Structured outputs, and tools with OpenAI's `tool_choice` and `parallel_tool_calls`.

    With both, the completion either matches the structured outputs or calls tools. `syntax` is how the model
    writes calls.
    """

    structured: StructuredOutputs | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    choice: str | Mapping[str, Any] = "auto"
    parallel: bool = True
    syntax: ToolSyntax = MISTRAL

    @classmethod
    def of(
        cls, structured: StructuredOutputs | None, tools: Sequence[Mapping[str, Any]] = (),
        choice: str | Mapping[str, Any] = "auto", parallel: bool = True, syntax: ToolSyntax = MISTRAL,
    ) -> GrammarSpec | None:  # fmt: skip
        """A request's specification; None if any text is allowed. Raises GrammarError for invalid tools."""
        check_tools(tools)
        if structured is None and choice in OPTIONAL_CHOICES:
            return None
        return cls(structured, () if choice == "none" else tuple(tools), choice, parallel, syntax)

    def lark(self, leading_space: bool) -> str:
        """The grammar in Lark notation; `leading_space` as in lark.lark. Raises GrammarError if it is invalid."""
        spec = tool_spec(self.tools, self.choice, self.parallel, self.syntax) or self.structured
        assert spec is not None  # otherwise `of` returned None
        if self.structured is not None and self.tools:
            spec = with_tools(spec, self.tools, self.parallel, leading_space, self.syntax)
        return lark(spec, leading_space, user_grammar=spec is self.structured)

    def to_json(self) -> str:
        """The specification as JSON, equal for equal ones. Raises GrammarError if it is not serializable."""
        given = {f.name: getattr(self.structured, f.name, None) for f in fields(StructuredOutputs)}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        values = {"structured_outputs": given, "tools": list(self.tools), "tool_choice": self.choice}
        written = []
        for name, value in values.items():
            try:
                written.append(json.dumps(value))
            except (TypeError, ValueError, RecursionError) as e:
                raise GrammarError(f"{name} cannot be written as JSON: {e}", field=name) from e
        return f"[{', '.join(written)}, {json.dumps(self.parallel)}, {json.dumps(astuple(self.syntax))}]"

    @classmethod
    def from_json(cls, text: str) -> GrammarSpec:
        """The inverse of `to_json`."""
        given, tools, choice, parallel, syntax = json.loads(text)
        return cls(StructuredOutputs(**given) if given else None, tools, choice, parallel, ToolSyntax(*syntax))
