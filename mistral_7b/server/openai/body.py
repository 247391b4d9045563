"""Base classes of request bodies, and validators of their fields. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, StrictInt, model_validator

from ...sampling.params import SamplingParams

INT64 = 1 << 63
Int = Annotated[StrictInt, Field(ge=-INT64, lt=INT64)]


class First(FailFast):
    """Stops the validation of a list at its first invalid entry."""

    __hash__ = object.__hash__  # FailFast has no hash, which pydantic needs in unions


def not_served(why: str) -> BeforeValidator:
    """A validator for a known field that is not supported and must not be ignored: only null is valid."""

    def refuse(value: Any) -> None:
        if value is not None:
            raise ValueError(f"not supported: {why}")

    return BeforeValidator(refuse)


def only(*values: Any) -> BeforeValidator:
    """A validator for a field of which only these values, and null, are supported: they change nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            known = " or ".join("true" if v is True else "false" if v is False else str(v) for v in values)
            raise ValueError(f"not supported, except as {known}")
        return value

    return BeforeValidator(check)


def without_nulls(model: type[BaseModel], data: Any) -> Any:
    """Leave out the null fields of a body, which mean what a missing field means. Only known, optional ones."""
    if not isinstance(data, dict) or None not in data.values():
        return data
    optional = {field.alias or name for name, field in model.model_fields.items() if not field.is_required()}
    return {name: value for name, value in data.items() if value is not None or name not in optional}


class Part(BaseModel):
    """A part that ignores unknown fields. Unsupported fields that would change the response are refused."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return without_nulls(cls, data)


class Body(BaseModel):
    """A request body or a part of one; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        """Keep only the first unknown field: pydantic would build one error for each of thousands."""
        data = without_nulls(cls, data)
        if not isinstance(data, dict) or len(data) <= len(cls.model_fields):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in data if name not in known)
        return {name: value for name, value in data.items() if name in known or name == unknown}


def sampling_params(given: Mapping[str, Any]) -> SamplingParams:
    """The engine's sampling parameters. SamplingError names a field that is out of range.

    `top_p` 0, which the engine refuses, is the limit of small ones: the most probable token alone.
    """
    if given.get("top_p") == 0:
        given = {**given, "top_p": 1.0, "top_k": 1}
    return SamplingParams.from_dict(given)
