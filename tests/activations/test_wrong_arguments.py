"""Wrong types and sizes in recording, patching and steering: refused by name, never a TypeError."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import refused
from tiny import TINY, tiny_model, tokens_of

from mistral_7b.engine.watching import Steering, watching_of
from mistral_7b.errors import InterpretError
from mistral_7b.model import Mistral7B

ZEROS = torch.zeros(TINY.dim)


@pytest.fixture(scope="module")
def model() -> Mistral7B:
    return tiny_model(TINY, torch.float32)


@pytest.mark.parametrize("layers", [1, slice(0, 2)])
def test_layers_are_a_list(model: Mistral7B, layers: Any) -> None:
    with refused(InterpretError, field="layers"), model.record("residual", layers=layers):
        pass


def test_a_long_name_is_shortened(model: Mistral7B) -> None:
    with refused(InterpretError, field="name") as caught, model.record("x" * 100_000):
        pass
    assert len(str(caught.value)) < 600


def test_a_tape_is_read_by_point_and_layer(model: Mistral7B) -> None:
    with model.record("residual") as tape:
        model(tokens_of((1, 4)))
    key: Any = ("residual", 1, 2)
    with refused(InterpretError, field="name"):
        tape[key]
    assert key not in tape


@pytest.mark.parametrize("value", ["a", None, lambda x: None, lambda x: "a"])
def test_a_value_is_a_tensor_a_number_or_a_functions_tensor(model: Mistral7B, value: Any) -> None:
    with refused(InterpretError, field="values"), model.patch({"residual.1": value}):
        model(tokens_of((1, 4)))


def test_values_are_a_mapping(model: Mistral7B) -> None:
    values: Any = ["residual.1"]
    with refused(InterpretError, field="values"), model.patch(values):
        pass


@pytest.mark.parametrize(
    "positions", [1.5, 10**30, [10**30], slice(0, 10**30), slice(10**30, None), range(10**12), range(1 << 30)]
)
def test_positions_have_bounds(model: Mistral7B, positions: Any) -> None:
    with refused(InterpretError, field="positions"), model.patch({"residual.1": 0.0}, positions=positions):
        pass
    with refused(InterpretError, field="positions"), model.steer(1, ZEROS, positions=positions):
        model(tokens_of((1, 4)))


@pytest.mark.parametrize(
    ("vector", "scale", "field"),
    [([0.0], 1.0, "vector"), (None, 1.0, "vector"), ("a", 1.0, "vector"),
     (ZEROS, "a", "scale"), (ZEROS, None, "scale"), (ZEROS, 10**400, "scale"), (ZEROS, float("nan"), "vector")],
)  # fmt: skip
def test_steering_takes_a_tensor_and_a_number(model: Mistral7B, vector: Any, scale: Any, field: str) -> None:
    with refused(InterpretError, field=field), model.steer(1, vector, scale=scale):
        pass


@pytest.mark.parametrize("record", [3, [3], True, {"residual": 1}, [("residual",)], [("residual", 1, 2)]])
def test_a_request_records_names(record: Any) -> None:
    with refused(InterpretError, field="record"):
        watching_of(record, None, TINY, 1)


@pytest.mark.parametrize(
    ("steer", "field"),
    [({"layer": 1}, "steer"), ("x", "steer"), (3, "steer"), ([3], "steer[0]"), ((1, ZEROS), "steer[0]"),
     (Steering(1, "abc"), "steer[0].vector"),  # type: ignore[arg-type]
     (Steering(1, [0.0, "a"]), "steer[0].vector"),  # type: ignore[list-item]
     (Steering(1, ZEROS, "a"), "steer[0].scale")],  # type: ignore[arg-type]
)  # fmt: skip
def test_a_request_is_steered_by_steering(steer: Any, field: str) -> None:
    with refused(InterpretError, field=field):
        watching_of(None, steer, TINY, 1)
