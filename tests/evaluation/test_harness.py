"""lm-eval's tasks on the engine: equal bits in any batch, equal numbers over HTTP, BOS once."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refused
from tokenizer_files import byte_fallback_folder

pytest.importorskip("lm_eval")

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.cli import main
from mistral_7b.errors import EvaluationError
from mistral_7b.evaluation import harness
from mistral_7b.evaluation.harness import HarnessModel, run_tasks

DEMO = Tokenizer.from_pretrained("demo")
TASKS = ("mini_python", "mini_answers", "mini_text")


@functools.cache
def model_of(batch: int = 8) -> HarnessModel:
    return HarnessModel(Mistral7B.from_pretrained("demo", quantization="int8"), DEMO, batch)


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@functools.cache
def results(batch: int) -> dict[str, Any]:
    return run_tasks(model_of(batch), TASKS)


def answers(found: dict[str, Any]) -> dict[str, Any]:
    return {task: [row["resps"] for row in rows] for task, rows in found["samples"].items()}


def test_tasks_have_equal_bits_at_every_batch_size() -> None:
    one = results(1)
    assert answers(one) == answers(results(8)) == answers(results(64))
    assert one["results"]["mini_python"]["acc_norm,none"] > 0.6  # the bundled model knows Python: by chance 0.25
    assert one["results"]["mini_text"]["bits_per_byte,none"] > 0.5


def test_requests_in_another_order_have_the_same_scores_and_texts() -> None:
    texts = ["import os\n", "def f(x):\n    return", "class A", "for i in range("]
    scored = [asked(a, b) for a in texts for b in (" x", "1)\n", " if\n")]
    made = [asked(a, {"until": ["\n\n"], "max_gen_toks": n, "do_sample": n > 6, "temperature": 0.8})
            for a in texts for n in (5, 9)]  # fmt: skip
    model = model_of()
    for requests, method in ((scored, model.loglikelihood), (made, model.generate_until)):
        order = list(range(len(requests)))
        random.Random(1).shuffle(order)
        wanted = method(requests)
        assert method([requests[i] for i in order]) == [wanted[i] for i in order]
        assert len(set(map(str, wanted))) > len(texts)


def test_stop_strings_and_token_limits() -> None:
    model = model_of()
    (whole,) = model.generate_until([asked("import os\n", {"until": [], "max_gen_toks": 30})])
    assert len(DEMO.encode(whole, bos=False)) in range(25, 32)
    stop = whole[5:8]
    (cut,) = model.generate_until([asked("import os\n", {"until": [stop, ""], "max_gen_toks": 30})])
    assert cut == whole[: whole.index(stop)]


def test_trap_17_bos_exactly_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of(), []
    monkeypatch.setattr("mistral_7b.evaluation.harness.score", lambda _, pairs, advance: seen.extend(pairs) or [
        [SimpleNamespace(logprob=0.0, greedy=True)] for _ in pairs])  # fmt: skip
    model.loglikelihood([asked("", "x = 1"), asked("x =", " 1"), asked("x = ", "1"), asked("<s>x", " 1")])
    model.loglikelihood_rolling([asked("x = 1\n")])
    chat = model.apply_chat_template([{"role": "user", "content": "Hi <s>"}])
    model.loglikelihood([asked(chat, "Yes")])
    for context, continuation in seen:
        assert [*context, *continuation].count(DEMO.bos_id) == 1
        assert context[0] == DEMO.bos_id
    assert seen[-1][0] == DEMO.encode_chat([{"role": "user", "content": "Hi <s>"}])
    assert model.tok_encode("x")[0] == DEMO.bos_id
    assert DEMO.bos_id not in model.tok_encode("x", add_special_tokens=False)


def test_a_rolling_text_is_one_pass_with_a_window() -> None:
    from mistral_7b.evaluation import perplexity

    text = "def add(a, b):\n    return a + b\n" * 30  # longer than the window of 256
    model = model_of()
    (found,) = model.loglikelihood_rolling([asked(text)])
    wanted = perplexity(model.inputs.engine.model, [text], DEMO).nats
    assert -found == pytest.approx(wanted, rel=1e-5)


def test_lm_evals_client_over_http_has_the_same_numbers(tmp_path: pathlib.Path) -> None:
    """The command of docs/evaluation.md, with a folder whose tokenizer.json gives the server's ids."""
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "server"))
    from serving import serving

    folder = byte_fallback_folder(tmp_path / "words", added=[], add_bos_token=True)
    out, include = tmp_path / "out", pathlib.Path(harness.__file__).with_name("tasks")
    with serving(trained=Mistral7B.from_pretrained("demo", quantization="int8"), tokenizer=DEMO) as server:
        model_args = f"base_url={server.url}/v1/completions,model={server.state.model_name},tokenizer={folder}"
        subprocess.run(
            [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "mini_python",
             "--include_path", include, "--model_args", f"{model_args},add_bos_token=True", "--output_path", out,
             "--log_samples"],
            check=True, timeout=240, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    (file,) = out.rglob("samples_mini_python_*.jsonl")
    rows = sorted(map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
    found = [[(float(score), greedy == "True") for ((score, greedy),) in row["resps"]] for row in rows]
    assert found == [[tuple(choice) for (choice,) in row] for row in answers(results(8))["mini_python"]]


def test_what_cannot_be_run_is_refused(tmp_path: pathlib.Path) -> None:
    with refused(EvaluationError, field="--tasks") as caught:
        run_tasks(model_of(), ["mini_choise"])
    assert "mini_choice" in str(caught.value)  # the name that was meant
    with refused(EvaluationError, field="--tasks", place="no_such.yaml"):
        run_tasks(model_of(), ["no_such.yaml"])
    with refused(EvaluationError, field="--include", place=tmp_path / "none"):
        run_tasks(model_of(), ["mini_text"], include=tmp_path / "none")
    for text in ("task: [x\n", "- a list\n", "task: x\ntest_split: test\n", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with refused(EvaluationError, field="--tasks"):
            run_tasks(model_of(), [str(tmp_path / "bad.yaml")])
    assert main(["eval", "harness", "demo"]) == 2
    assert main(["eval", "harness", "demo", "--tasks", "mini_text", "--limit", "0"]) == 2


def test_tasks_are_looked_up_before_the_model_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "harness", "no-such-model", "--tasks", "no_such.yaml"]) == 2
    assert "no_such.yaml" in capsys.readouterr().err


def test_nothing_is_printed_outside_a_checkout(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_tasks(model_of(), ["mini_answers"], limit=1)
    assert capfd.readouterr().err == ""


def test_without_lm_eval_one_error_says_what_to_install() -> None:
    code = (
        "import importlib.util as u, sys\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'lm_eval' else find(name, *more)\n"
        "from mistral_7b.cli import main\nsys.exit(main(['eval', 'harness', 'demo', '--tasks', 'mini_text']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "mistral-7b[eval]" in done.stderr
    assert "torch" not in done.stderr


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "harness", "demo", "--tasks", "mini_text", "--json", "--quantization", "int8"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]["mini_text"]
    assert found["bits_per_byte"] == results(8)["results"]["mini_text"]["bits_per_byte,none"]
    assert found["documents"] == 6
    assert torch.get_num_threads() == 1
