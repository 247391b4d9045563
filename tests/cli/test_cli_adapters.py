"""`mistral-7b merge`, and `--adapter` of generate, chat and bench."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch
from command import SHAPE, write_model
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from safetensors.torch import load_file, save_file

from mistral_7b import Mistral7B, ModelArgs, Tokenizer
from mistral_7b.bench.peers.ours import Engine
from mistral_7b.checkpoint.names import expected
from mistral_7b.cli.bench import Bench, plan_of
from mistral_7b.lora.files import Adapter, Factors, save_adapter

GREEDY = ("--max-tokens", "6", "--temperature", "0", "--json", "--device", "cpu", "--dtype", "float32")
EMBEDDING, OUTPUT = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


def write_adapter(folder: pathlib.Path, args: ModelArgs, scale: float = 8.0) -> pathlib.Path:
    draw = torch.Generator().manual_seed(4)
    linears = [(n.removesuffix(".weight"), s) for n, s in expected(args) if n.startswith("layers") and len(s) == 2]
    factors = {
        n: Factors(torch.randn(4, s[1], generator=draw), 0.05 * torch.randn(s[0], 4, generator=draw), scale)
        for n, s in linears
    }
    save_adapter(Adapter(factors), folder, args, base_model="org/base")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    args = ModelArgs(**{**SHAPE, "sliding_window": 8})  # type: ignore[arg-type]
    return str(write_adapter(tmp_path_factory.mktemp("adapters") / "plain", args))


def ids(result) -> list[int]:  # type: ignore[no-untyped-def]
    assert result.code == 0, result.err
    return json.loads(result.out)["outputs"][0]["token_ids"]


def in_float32(source: str, out: pathlib.Path) -> str:
    """A copy in float32, of which a merge is no near tie away from the adapter."""
    Mistral7B.from_pretrained(source, dtype=torch.float32).save_pretrained(out)
    return str(out)


def test_merged_it_generates_what_it_does_at_run_time(
    run, windowed: str, adapter: str, tmp_path: pathlib.Path
) -> None:
    windowed = in_float32(windowed, tmp_path / "base")
    words = ("--prompt", "one two three four five six seven eight nine ten", *GREEDY)
    out = tmp_path / "merged"
    code, stdout, err = run("merge", windowed, adapter, str(out), "--tokens", "60", "--threads", "1")
    assert (code, stdout) == (0, ""), err
    record = json.loads((out / "merge.json").read_text())
    assert (record["weights"], record["changed"], record["distance"]["tokens"]) == (14, 14, 60)
    assert (out / "tokenizer.model.v3").is_file()
    adapted = ids(run("generate", windowed, "--adapter", adapter, *words))
    assert adapted == ids(run("generate", str(out), *words))
    assert adapted != ids(run("generate", windowed, *words))
    for to, name in (("mistral", "out"), ("gguf", "out.gguf")):
        assert run("merge", windowed, adapter, str(tmp_path / name), "--to", to, "--tokens", "60").code == 0
        assert ids(run("generate", str(tmp_path / name), *words)) == adapted


def test_a_merge_into_quantized_weights_for_ollama(
    run, windowed: str, adapter: str, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "made.gguf"
    words = ("merge", windowed, adapter, str(out), "--into", "int8", "--tokens", "60", "--ollama", "--to", "gguf")
    code, _, err = run(*words, "--type", "bf16")
    assert code == 0, err
    made = (tmp_path / "Modelfile").read_text()
    assert made.startswith("FROM ./made.gguf\nTEMPLATE ")
    assert made.endswith('PARAMETER stop "</s>"\n')
    out.unlink()
    assert run(*words, "--type", "bf16").code == 2  # there is a Modelfile
    assert run("merge", windowed, adapter, str(tmp_path / "out"), "--ollama").code == 2
    assert not out.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.wording
def test_the_summary_of_a_merge(run, windowed: str, adapter: str, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text"
    text.write_text("It was a bright cold day in April. " * 9)
    err = run("merge", windowed, adapter, str(tmp_path / "out"), "--text", str(text)).err
    for words in (f"written to {tmp_path}/out", "14 of 14 adapted weights changed, rounded to bfloat16", str(text),
                  "adapter at run time -> merged: KL", "top-1 agreement"):  # fmt: skip
        assert words in " ".join(err.split()), words


def test_chat_answers_with_the_adapter(run, windowed: str, adapter: str) -> None:
    flags = ("--max-tokens", "8", "--temperature", "0", "--dtype", "float32", "--device", "cpu")
    plain, adapted = (
        run("chat", windowed, *flags, *more, stdin="hello\n") for more in ([], ["--adapter", adapter])
    )
    assert (plain.code, adapted.code) == (0, 0), adapted.err
    assert plain.out != adapted.out


@pytest.mark.parametrize("kind", ["adapter", "chatml"])
def test_bench_measures_with_the_adapter(windowed: str, kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    flags = {"context": 20, "threads": 1, "quick": True, "scheme": ("int8",), "what": ("decode",)}
    plain, adapted = (plan_of(Bench(windowed, adapter=one, **flags)) for one in (None, path))
    assert adapted.model == f"{windowed} with {pathlib.Path(path).name}"
    engines = []
    for plan in (plain, adapted):
        (job,) = plan.jobs()
        torch.manual_seed(1)
        engines.append(Engine(job))
        engines[-1].tokens %= 32000
        engines[-1].begin()
    before, after = engines
    if kind == "adapter":
        linears = [
            shape for name, shape in expected(ModelArgs(**plain.args)) if "layers" in name and len(shape) == 2
        ]
        assert after.weight_bytes - before.weight_bytes == 2 * 4 * sum(map(sum, linears))  # bfloat16, rank 4
    assert not torch.equal(before.logits[..., :32000], after.logits[..., :32000])
    after.step()
    assert after.generated(0.1) > 0


@pytest.fixture(scope="module")
def chatml(adapter: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter with two more tokens, its own embedding and output, and the tokenizer of v0.1 beside it."""
    folder = tmp_path_factory.mktemp("adapters") / "chatml"
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = 0.1 * torch.randn(2, 32002, SHAPE["dim"], generator=torch.Generator().manual_seed(1))
    tensors |= {EMBEDDING: rows[0].contiguous(), OUTPUT: rows[1].contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors")
    shutil.copyfile(MistralTokenizer._data_path() / "tokenizer.model.v1", folder / "tokenizer.model")
    return str(folder)


def test_an_adapter_brings_its_vocabulary_and_its_tokenizer(
    run, adapter: str, chatml: str, tmp_path: pathlib.Path
) -> None:
    base = in_float32(str(write_model(tmp_path / "16", vocab_size=32000, sliding_window=8)), tmp_path / "base")
    text = "def f(x): return x and more words than twice the window of eight tokens"
    v1 = Tokenizer.from_pretrained(chatml)
    first = run("generate", base, "--adapter", chatml, "--prompt", text, *GREEDY)
    assert json.loads(first.out)["prompt_token_ids"] == v1.encode(text) != Tokenizer.v3().encode(text)
    assert run("merge", base, chatml, str(tmp_path / "merged"), "--tokens", "60").code == 0
    merged = Mistral7B.from_pretrained(tmp_path / "merged")
    assert merged.args.vocab_size == 32002
    again = run("generate", str(tmp_path / "merged"), "--prompt", text, *GREEDY)
    assert json.loads(again.out)["prompt_token_ids"] == v1.encode(text)
    assert ids(again) == ids(first)
    with_base = run("generate", base, "--adapter", chatml, "--tokenizer", chatml, "--prompt", text, *GREEDY)
    assert ids(with_base) == ids(first)


@pytest.mark.wording
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/other", "it is an adapter of another model, org/base: use it with that one"),
        ("{model}", "this folder is a model"),
        ("{tmp}", "holds no adapter"),
        ("/nowhere", "/nowhere: no such file or folder"),
        ("./owner/name", "an adapter on the hub is named owner/name"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat", "bench", "merge"])
def test_what_is_no_adapter_of_the_model(
    run, windowed: str, tmp_path: pathlib.Path, command: str, path: str, message: str
) -> None:
    write_adapter(tmp_path / "other", ModelArgs(**{**SHAPE, "dim": 32}))  # type: ignore[arg-type]
    path = path.format(tmp=tmp_path, model=windowed)
    words = [path, str(tmp_path / "out")] if command == "merge" else ["--adapter", path]
    code, out, err = run(command, windowed, *words, *(["--prompt", "x"] if command == "generate" else []))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.wording
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "{model}", "{adapter}", "{tmp}/out", "--tokens", "1"], "--tokens must be at least 2"),
        (["merge", "{model}", "{adapter}", "{tmp}"], "exists already"),
        (["merge", "{model}", "{adapter}", "{tmp}/out", "--type", "q8_0"], "applies only to GGUF"),
        (["bench", "{model}", "--adapter", "{adapter}", "--peers"], "--adapter and --peers exclude each other"),
        (["bench", "{model}", "--adapter", "{adapter}", "--serving"], "--adapter: not with --serving"),
    ],
)
def test_what_is_refused(
    run, windowed: str, adapter: str, tmp_path: pathlib.Path, words: list[str], message: str
) -> None:
    (tmp_path / "kept").write_text("x")
    code, out, err = run(*(w.format(model=windowed, adapter=adapter, tmp=tmp_path) for w in words))
    assert (code, out) == (2, "")
    assert message in err
    assert [f.name for f in tmp_path.iterdir()] == ["kept"]
