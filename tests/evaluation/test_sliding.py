"""Perplexity of a file: against the reference, block by block, and after a kill."""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
import time

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, truth
from waiting import until

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.cli import main
from mistral_7b.errors import EvaluationError
from mistral_7b.evaluation import sliding, sliding_perplexity

sys.path.append(str(pathlib.Path(__file__).parents[1] / "cli"))
from command import start

DEMO = Tokenizer.from_pretrained("demo")
TEXT = "def f(x):\n    return x1\n\nclass A\n    é = '日本'\r\nend\n\n\n  x = 3 \n" * 2


def nats(model: Mistral7B, ids: list[int], begin: int) -> float:
    table = truth(model, torch.tensor(ids[:-1])).log_softmax(-1)
    return -sum(table[i, ids[i + 1]].item() for i in range(begin, len(ids) - 1))


@pytest.mark.parametrize("window", [8, None])
def test_each_token_is_scored_once_in_its_context(
    window: int | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliding, "CHUNK", 7)
    args = tiny_args(sliding_window=window, vocab_size=4096, max_seq_len=24)
    model, path = tiny_model(args, torch.float64), tmp_path / "text"
    path.write_bytes(TEXT.encode())
    ids = DEMO.encode(TEXT, bos=False)
    assert len(ids) > 2 * 24
    if window is not None:
        found, wanted = sliding_perplexity(model, DEMO, path), nats(model, [1, *ids], 0)
        with refused(EvaluationError, field="stride"):
            sliding_perplexity(model, DEMO, path, stride=3)
    else:
        found = sliding_perplexity(model, DEMO, path, context=12, stride=5)
        wanted = nats(model, [1, *ids[:12]], 0)
        for end in range(12, len(ids), 5):
            part = [1, *ids[end - 7 : end + 5]]
            wanted += nats(model, part, 7)
        for wrong in ({"context": 25}, {"context": 1}, {"stride": 0}, {"context": 5, "stride": 6}):
            with refused(EvaluationError, field=list(wrong)[-1]):
                sliding_perplexity(model, DEMO, path, **wrong)
    assert found.nats == pytest.approx(wanted, abs=1e-6)
    assert (found.tokens, found.bytes) == (len(ids), len(TEXT.encode()))


@pytest.mark.parametrize("block", [3, 40, 1 << 16])
def test_blocks_have_the_ids_of_the_whole_text(
    block: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliding, "BLOCK", block)
    path = tmp_path / "text"
    path.write_bytes((TEXT * 9).encode())
    with path.open("rb") as file:
        blocks = list(sliding._token_blocks(file, DEMO, hashlib.sha256()))
    assert [i for ids in blocks for i in ids] == DEMO.encode(TEXT * 9, bos=False)
    assert (len(blocks) > 5) == (block < 100)


def test_a_text_without_lines_is_cut_between_characters(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliding, "BLOCK", 5)
    monkeypatch.setattr(sliding, "LONGEST", 10)
    path = tmp_path / "text"
    path.write_bytes("日本語é".encode() * 20)
    with path.open("rb") as file:
        ids = [i for b in sliding._token_blocks(file, DEMO, hashlib.sha256()) for i in b]
    assert DEMO.decode(ids) == "日本語é" * 20
    path.write_bytes(b"abc\xff\xfe")
    with path.open("rb") as file, refused(EvaluationError, field="text", place=path):
        list(sliding._token_blocks(file, DEMO, hashlib.sha256()))


def test_a_state_that_cannot_be_written_is_refused_before_the_work(tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["eval", "perplexity", "no-such-model", "--text", str(tmp_path / "text.txt")]
    assert main([*words, "--state", str(tmp_path / "none" / "state")]) == 1
    assert main([*words, "--state", str(tmp_path / "state")]) == 2  # the model: this place is good
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("flags", [(), ("--context", "48", "--stride", "8")])
def test_a_killed_run_continues_with_the_same_bits(
    flags: tuple[str, ...], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text, state = tmp_path / "model", tmp_path / "text", tmp_path / "state"
    model = Mistral7B.from_pretrained("demo")
    if flags:
        args = tiny_args(sliding_window=None, vocab_size=4096, max_seq_len=64)
        model = tiny_model(args, torch.bfloat16)
    model.save_pretrained(folder)
    if flags:
        (folder / "tokenizer.model.v3").write_bytes(pathlib.Path(DEMO.path).read_bytes())
    text.write_text(pathlib.Path(sliding.__file__).read_text() * (1 if flags else 2))
    command = ("eval", "perplexity", str(folder), "--text", str(text), "--json", "--threads", "1", *flags)
    assert main([*command]) == 0
    whole = json.loads(capsys.readouterr().out)
    slowly = (
        "from mistral_7b.evaluation import sliding; import time\n"
        "sliding.SAVE_EVERY, add = 0.0, sliding._add\n"
        "sliding._add = lambda *a: (time.sleep(0.1), add(*a))"
    )
    process = start(*command, "--state", str(state), before=slowly)
    assert until(state.exists, 60)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    assert torch.load(state, weights_only=True)["tokens"] > 0
    if flags:
        assert main([*command, "--state", str(state), "--dtype", "float32"]) != 0
        assert capsys.readouterr().out == ""  # a state of other weights
    assert main([*command, "--state", str(state)]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed == whole
    assert not state.exists()
