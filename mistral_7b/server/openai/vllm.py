"""Fields of vLLM's API: constraints on the text, and options that are supported at their defaults. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import StrictBool, StrictFloat, StrictInt

from ...errors import SamplingError
from ...sampling.params import StructuredOutputs
from ..http.errors import HttpError
from .body import Body, not_served, only

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
FIXED = "the template is the model's"


class Constraint(Body):
    """`structured_outputs`, or its older names: `guided_json` is `structured_outputs.json`."""

    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def constrained_by(self) -> str | None:
        """The field that has a constraint. HttpError if several have."""
        given = [name for name in ("structured_outputs", *GUIDED) if getattr(self, name) is not None]
        if len(given) > 1:
            raise HttpError(400, f"{' and '.join(given)} exclude each other", field=given[-1])
        return given[0] if given else None

    def constraint(self) -> StructuredOutputs | None:
        """The constraint on the text, or None."""
        name = self.constrained_by
        if name is None:
            return None
        value = getattr(self, name)
        if name in GUIDED:
            value = {name.removeprefix("guided_"): value}
        with self.named():
            return StructuredOutputs.from_dict(value)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors about the constraint name the field that the client used."""
        try:
            yield
        except SamplingError as e:
            name = self.constrained_by
            if name not in GUIDED or e.field is None or not e.field.startswith("structured_outputs"):
                raise
            raise type(e).of(e, message=e.message.replace(e.field, name), field=name) from e


class Defaults(Body):
    """Options that clients of vLLM send at their defaults. Other values are not supported, and refused by name."""

    skip_special_tokens: Annotated[StrictBool | None, only(True)] = None
    include_stop_str_in_output: Annotated[StrictBool | None, only(False)] = None
    use_beam_search: Annotated[StrictBool | None, only(False)] = None
    early_stopping: Annotated[StrictBool | None, only(False)] = None
    length_penalty: Annotated[StrictFloat | None, only(1.0)] = None
    return_token_ids: Annotated[StrictBool | None, only(False)] = None
    return_tokens_as_token_ids: Annotated[StrictBool | None, only(False)] = None
    bad_words: Annotated[list[str] | None, only([])] = None
    logits_processors: Annotated[list[Any] | None, only([])] = None
    allowed_token_ids: Annotated[None, not_served("use structured_outputs")] = None
    truncate_prompt_tokens: Annotated[None, not_served("send a shorter prompt")] = None
    documents: Annotated[None, not_served(FIXED)] = None
    chat_template: Annotated[None, not_served(FIXED)] = None
    guided_whitespace_pattern: Annotated[None, not_served("use guided_grammar")] = None
    # Accepted and ignored: they would not change the response.
    spaces_between_special_tokens: StrictBool | None = None  # special tokens are skipped
    include_reasoning: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    guided_decoding_backend: str | None = None
    request_id: str | None = None
    thinking_token_budget: StrictInt | None = None
