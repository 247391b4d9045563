"""Errors carry data: across pickling, into errors of other classes, and whatever their messages say."""

from __future__ import annotations

import copy
import inspect
import json
import pathlib
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mistral_7b import errors
from mistral_7b.engine.llm import RequestsFailedError
from mistral_7b.errors import CheckpointError, ConfigError, Mistral7BError, first_line

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Mistral7BError)]
WHOLE = {"field": "dim", "place": "config.json, line 3", "hint": "fetch the file again"}


@pytest.mark.wording
def test_the_text_is_made_of_the_data() -> None:
    assert str(Mistral7BError()) == ""
    assert str(Mistral7BError("dim is odd", field="dim")) == "dim is odd"
    assert str(Mistral7BError("dim is odd", **WHOLE)) == "config.json, line 3: dim is odd; fetch the file again"
    assert str(Mistral7BError("dim is odd", hint="make it even")) == "dim is odd; make it even"
    error = Mistral7BError("cut short", place=pathlib.Path("a/b"))
    assert (error.place, str(error)) == ("a/b", "a/b: cut short")
    with pytest.raises(TypeError):
        Mistral7BError("dim is odd", "dim")  # type: ignore[misc]


@pytest.mark.wording
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_data_survive_pickling_copying_and_json(kind: type[Mistral7BError]) -> None:
    error = kind("dim is odd", **WHOLE)
    assert error.data == {"message": "dim is odd", **WHOLE}
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), kind(**json.loads(json.dumps(error.data)))):
        assert type(again) is kind
        assert (again.data, str(again), again.args) == (error.data, str(error), error.args)


def test_errors_with_arguments_of_their_own_survive_pickling() -> None:
    failed = RequestsFailedError([SimpleNamespace(error=ConfigError("odd", field="dim"))])  # type: ignore[list-item]
    again = pickle.loads(pickle.dumps(failed))
    assert again.data == failed.data
    assert again.outputs[0].error.data == failed.outputs[0].error.data


def test_refusals_survive_pickling() -> None:
    problems = pytest.importorskip("mistral_7b.server.http.errors")
    why = problems.HttpError(429, "full", field="model", hint="wait", code="queue_full", retry_after=3)
    again = pickle.loads(pickle.dumps(why))
    assert (again.status, again.code, again.headers) == (429, "queue_full", {"retry-after": "3"})
    assert again.body() == why.body()


@pytest.mark.wording
def test_another_class_takes_the_data_over() -> None:
    error = ConfigError("dim is odd", field="dim", hint="make it even")
    other = CheckpointError.of(error, place=pathlib.Path("config.json"), hint=None)
    assert isinstance(other, CheckpointError)
    assert other.data == {"message": "dim is odd", "field": "dim", "place": "config.json", "hint": None}


def test_what_other_libraries_say_is_cut_to_a_line() -> None:
    assert first_line(ValueError("\n  one\ntwo\n")) == "one"
    assert first_line(ValueError()) == "ValueError"


def test_they_need_no_torch() -> None:
    code = "import sys, mistral_7b.errors, mistral_7b.sampling.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
