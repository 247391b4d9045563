"""Names of lm-eval's tasks from the text of their files."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from refusals import refused

from mistral_7b.errors import EvaluationError
from mistral_7b.evaluation.task_names import TASKS, check_names

INSTALLED = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def test_names_of_the_package_and_of_a_folder_are_found(tmp_path: pathlib.Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "_own_yaml").write_text("\"task\": 'own_task'\ntag:\n  - own_tag\n")
    (tmp_path / "lost.yaml").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.yaml")
    check_names([path.stem for path in TASKS.glob("*.yaml")])
    check_names(["own_task", "own_tag", "mini_text", str(TASKS / "mini_text.yaml")], tmp_path)
    with refused(EvaluationError, field="--tasks") as caught:
        check_names(["mini_text", "Own_tsk"], tmp_path)
    assert "'own_task'" in str(caught.value)
    with refused(EvaluationError, field="--tasks", place="none.yaml"):
        check_names(["none.yaml"])
    with refused(EvaluationError, field="--include", place=tmp_path / "none"):
        check_names(["mini_text"], tmp_path / "none")


@INSTALLED
def test_names_of_lm_evals_own_tasks_are_found() -> None:
    check_names(["hellaswag", "mmlu", "arc_easy", "lambada_openai", "wikitext"])
    with refused(EvaluationError, field="--tasks") as caught:
        check_names(["helaswag"])
    assert "'hellaswag'" in str(caught.value)


@INSTALLED
def test_a_wrong_name_is_refused_before_lm_eval_is_imported() -> None:
    code = (
        "import sys\nfrom mistral_7b.cli import main\n"
        "code = main(['eval', 'harness', 'no-such-model', '--tasks', 'NO_SUCH_TASK'])\n"
        "sys.exit(code if 'lm_eval' not in sys.modules else 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'NO_SUCH_TASK'" in done.stderr
