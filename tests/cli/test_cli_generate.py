"""`mistral-7b generate`: output on stdout and stderr, and errors."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import pytest
import torch
from command import write_model

from mistral_7b.engine.pages import PagePool
from mistral_7b.generate import generate
from mistral_7b.model import Mistral7B
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.tokenizer import Tokenizer

PROMPT = "def fibonacci(n):\n    return 1 if n < 2 else"


def expected(folder: str, **params: object) -> list[str]:
    model = Mistral7B.from_pretrained(folder)
    outputs = generate(model, PROMPT, SamplingParams(**params), Tokenizer.from_pretrained(folder))
    return [c.text for c in outputs[0].outputs]


def test_text_on_stdout_statistics_on_stderr(run, windowed: str) -> None:
    code, out, err = run("generate", windowed, "--prompt", PROMPT, "--max-tokens", "30", "--seed", "5")
    assert code == 0
    assert out == expected(windowed, max_tokens=30, seed=5, temperature=0.7)[0] + "\n"
    assert re.fullmatch(
        r"\d+ prompt tokens, 30 generated in \d+\.\d\d s: \d+\.\d tokens/s, first token after \d+\.\d\d s\n", err
    )


def test_prompt_from_file_and_from_stdin(run, windowed: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    flags = ("--max-tokens", "20", "--temperature", "0")
    direct = run("generate", windowed, f"--prompt={PROMPT}", *flags).out
    assert direct == expected(windowed, max_tokens=20, temperature=0)[0] + "\n"
    assert run("generate", windowed, "--prompt-file", str(file), *flags).out == direct
    assert run("generate", windowed, *flags, stdin=PROMPT).out == direct
    assert run("generate", windowed, "--prompt-file", "-", *flags, stdin=PROMPT).out == direct
    assert run("generate", windowed, "--prompt", PROMPT, "--echo", "always", *flags).out == PROMPT + direct


def test_the_bundled_model_has_a_prompt_of_its_own(run, windowed: str, monkeypatch) -> None:
    monkeypatch.setattr("mistral_7b.checkpoint.hub.DEMO", pathlib.Path(windowed))
    code, out, err = run("generate", "--max-tokens", "3")
    assert code == 0, err
    assert out.startswith("class TestParser(unittest.TestCase):\n")


def test_every_sampling_flag_arrives(run, windowed: str) -> None:
    flags = {
        "temperature": "0.9", "top-k": "50", "top-p": "0.8", "min-p": "0.001", "repetition-penalty": "1.2",
        "presence-penalty": "0.1", "frequency-penalty": "0.2", "seed": "11", "max-tokens": "25", "min-tokens": "3",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    words += [
        "--logit-bias",
        "1300",
        "5.5",
        "--stop",
        "zzzz",
        "yyyy",
        "--stop-token-ids",
        "7",
        "8",
        "--ignore-eos",
    ]
    values = {name.replace("-", "_"): json.loads(value) for name, value in flags.items()}
    wanted = expected(
        windowed, **values, logit_bias={1300: 5.5}, stop=["zzzz", "yyyy"], stop_token_ids=[7, 8], ignore_eos=True
    )
    assert run("generate", windowed, "--prompt", PROMPT, *words).out == wanted[0] + "\n"


@pytest.mark.wording
def test_speculation(run, windowed: str, short: str, tmp_path: pathlib.Path) -> None:
    """Prompt lookup and a draft model give the same text; both outputs have statistics."""
    prompt, flags = "a b a b a b a b", ["--max-tokens", "40", "--seed", "5", "--dtype", "float32"]
    flags += ["--logit-bias", "1032", "90"]  # repeats one token, so that drafts are accepted
    plain = run("generate", windowed, "--prompt", prompt, *flags).out
    for how in ("prompt-lookup", windowed):
        result = run("generate", windowed, "--prompt", prompt, *flags, "--speculate", how, "--max-draft", "3")
        assert (result.code, result.out) == (0, plain)
        found = re.search(r"; (\d\.\d\d) tokens per step, (\d+) of (\d+) draft tokens accepted\n$", result.err)
        assert found
        assert 0 < int(found[2]) <= int(found[3])
        facts = json.loads(
            run(
                "generate", windowed, "--prompt", prompt, *flags, "--speculate", how, "--json", "--logprobs", "0"
            ).out
        )
        told = facts["stats"]["speculation"]
        assert facts["outputs"][0]["text"] + "\n" == plain
        assert (told["tokens"], told["steps"]) == (40, 40 - told["accepted"])
        assert told["tokens_per_step"] == round(40 / told["steps"], 4)
        assert told["acceptance"] == round(told["accepted"] / told["drafted"], 4)
    other = write_model(tmp_path / "other", vocab_size=32769)
    for words, message in (
        (["--max-draft", "3"], "--max-draft needs --speculate"),
        (["--speculate", "prompt-lookup", "--max-draft", "0"], "max_draft must be at least 1"),
        (["--speculate", "./nowhere/at-all"], "./nowhere/at-all"),
        (["--speculate", str(other)], "must share a vocabulary"),
    ):
        code, out, err = run("generate", windowed, "--prompt", prompt, *words)
        assert (code, out) == (2, "")
        assert message in err
    assert (
        "speculation"
        not in json.loads(run("generate", short, "--prompt", "x", "--max-tokens", "3", "--json").out)["stats"]
    )


def test_int8_keys_and_values(run, windowed: str, monkeypatch) -> None:
    """The flag takes effect, with and without log-probabilities; float32 rounds alike everywhere."""
    flags = ["--prompt", PROMPT, "--max-tokens", "60", "--seed", "5", "--dtype", "float32", "--kv", "int8"]
    made: list[object] = []
    plain = PagePool.__init__

    def noted(pool: PagePool, *args: object, **how: object) -> None:
        made.append(how["int8"])
        plain(pool, *args, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:  # so few tokens may be equal in both types
        patch.setattr(PagePool, "__init__", noted)
        code, out, err = run("generate", windowed, *flags)
    assert code == 0, err
    assert made == [True]
    model, tokenizer = (
        Mistral7B.from_pretrained(windowed, dtype=torch.float32),
        Tokenizer.from_pretrained(windowed),
    )
    params = SamplingParams(max_tokens=60, seed=5, temperature=0.7, logprobs=0)
    int8, plain = (
        generate(model, PROMPT, params, tokenizer, kv_dtype=kv_dtype)[0].outputs[0]
        for kv_dtype in (torch.int8, None)
    )
    assert out == int8.text + "\n"
    facts = json.loads(run("generate", windowed, *flags, "--json", "--logprobs", "0").out)["outputs"][0]
    assert facts["token_ids"] == int8.token_ids
    told = [entry["logprob"] for place in facts["logprobs"] for entry in place.values()]
    known, others = ([e.logprob for place in c.logprobs for e in place.values()] for c in (int8, plain))
    assert told == pytest.approx(known, abs=1e-5)
    assert told != pytest.approx(others, abs=1e-5)
    assert run("generate", windowed, *flags[:-1], "int4").code == 2


def test_several_completions(run, windowed: str) -> None:
    out = run("generate", windowed, "--prompt", PROMPT, "--n", "2", "--max-tokens", "9", "--seed", "1").out
    first, second = expected(windowed, n=2, max_tokens=9, seed=1, temperature=0.7)
    assert first != second
    assert out == f"--- 1 of 2 ---\n{first}\n--- 2 of 2 ---\n{second}\n"


def test_json(run, windowed: str) -> None:
    code, out, err = run("generate", windowed, "--prompt", PROMPT, "--max-tokens", "12", "--seed", "5", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["outputs"][0]["text"] == expected(windowed, max_tokens=12, seed=5, temperature=0.7)[0]
    assert facts["outputs"][0]["finish_reason"] == "length"
    assert len(facts["outputs"][0]["token_ids"]) == facts["stats"]["completion_tokens"] == 12
    assert facts["prompt_token_ids"] == Tokenizer.from_pretrained(windowed).encode(PROMPT)
    assert (facts["prompt"], facts["seed"]) == (PROMPT, 5)
    assert 0 < facts["stats"]["seconds_to_first_token"] <= facts["stats"]["seconds"]


def test_json_has_log_probabilities(run, windowed: str) -> None:
    flags = ("--max-tokens", "4", "--logprobs", "2", "--prompt-logprobs", "1", "--json", "--temperature", "0")
    facts = json.loads(run("generate", windowed, "--prompt", PROMPT, *flags).out)
    output = facts["outputs"][0]
    for token, places in zip(output["token_ids"], output["logprobs"], strict=True):
        assert places[str(token)]["rank"] == 1
        assert len(places) == 2
    assert sum(p[str(t)]["logprob"] for t, p in zip(output["token_ids"], output["logprobs"], strict=True)) == (
        pytest.approx(output["cumulative_logprob"])
    )
    assert len(facts["prompt_logprobs"]) == len(facts["prompt_token_ids"])


def test_runs_differ_unless_seeded(run, windowed: str) -> None:
    command = ("generate", windowed, "--prompt", PROMPT, "--max-tokens", "12")
    assert run(*command).out != run(*command).out
    assert run(*command, "--seed", "3").out == run(*command, "--seed", "3").out
    told = json.loads(run(*command, "--json").out)  # the seed that was drawn reproduces the text
    assert run(*command, "--seed", str(told["seed"])).out == told["outputs"][0]["text"] + "\n"


def test_dtype_and_threads(run, windowed: str, monkeypatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.update(threads=n))

    def spy(model, *rest, **options):
        seen.update(dtype=model.output.weight.dtype, device=model.output.weight.device.type)
        return iter(())

    monkeypatch.setattr(sys.modules["mistral_7b.generate"], "stream", spy)  # by name it is the function
    flags = ("--dtype", "float32", "--threads", "3", "--device", "cpu")
    assert run("generate", windowed, "--prompt", PROMPT, *flags).code == 0
    assert seen == {"dtype": torch.float32, "device": "cpu", "threads": 3}


@pytest.mark.wording
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be"),
        (["--top-p", "x"], "--top-p"),
        (["--logprobs", "1"], "add --json"),
        (["--prompt-file", "/nowhere/prompt"], "/nowhere/prompt: No such file"),
        (["--prompt-file", "x", "--prompt", "y"], "exclude each other"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--tokenizer", "/nowhere/tokenizer.model"], "/nowhere/tokenizer.model"),
        (["--max-tokens", "100", "--prompt", "x"], "do not fit the context of 64"),
        (["--stop-token-ids", "40000", "--prompt", "x"], "40000"),
        (["--prompt", "\udcff"], "not UTF-8"),
        ([], "no prompt"),
    ],
)
def test_what_is_refused(run, short: str, flags: list[str], message: str) -> None:
    stdin = "" if not flags else "a prompt"
    code, out, err = run("generate", short, *flags, stdin=stdin)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.wording
def test_bytes_that_are_no_text(run, short: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "p").write_bytes(b"ab\xff")
    code, _, err = run("generate", short, "--prompt-file", str(tmp_path / "p"))
    assert code == 2
    assert "is not UTF-8 text (byte 2)" in err


@pytest.mark.wording
def test_tokenizer_of_another_model(run, tmp_path: pathlib.Path, windowed: str) -> None:
    folder = write_model(tmp_path / "small", vocab_size=300)
    code, _, err = run("generate", str(folder), "--prompt", "x")
    assert code == 2
    assert "the tokenizer belongs to another model" in err


def test_model_that_is_not_there(run) -> None:
    code, _, err = run("generate", "./nowhere/at-all", "--prompt", "x")
    assert code == 2
    assert "./nowhere/at-all" in err
