"""Pictures: their numbers against the model's own, their pages as safe documents, their files."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, tiny_model

from mistral_7b import Mistral7B
from mistral_7b.cache import Stateless
from mistral_7b.cli import main
from mistral_7b.errors import InterpretError
from mistral_7b.interpret import explain
from mistral_7b.interpret.explain import heads, lens, operators
from mistral_7b.interpret.explain.page import plotted
from mistral_7b.text.tokenizer import Tokenizer

HOSTILE = 'def f(): return "</script><script>alert(1)</script><!--data-->" # naïve 日本 🙂 $x$\n'
SUFFIXES = ("html", "png")


@pytest.fixture(scope="module")
def demo() -> tuple[Mistral7B, Tokenizer]:
    return Mistral7B.from_pretrained("demo", dtype=torch.float32), Tokenizer.from_pretrained("demo")


class Numbers:
    """A tokenizer of the tiny model: each id is its number."""

    def piece(self, token: int) -> str:
        return str(token)


NUMBERS: Tokenizer = Numbers()  # type: ignore[assignment]
IDS = [(7 * i * i + 3 * i) % TINY.vocab_size for i in range(40)]  # five windows


def test_attention_maps_are_the_recorded_weights() -> None:
    model = tiny_model()
    with model.record("attention") as tape:
        model(torch.tensor([IDS]))
    picture = explain.attention_maps(model, NUMBERS, IDS)
    assert picture.tile == 1
    for n, codes in enumerate(picture.maps):
        kept = (torch.from_numpy(codes).double() / 255) ** 2
        assert (kept - tape["attention", n][0]).abs().max() < 0.004


def test_the_largest_weights_are_kept_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small budget: tiles hold maxima, entries exact pairs, and the file keeps its size."""
    monkeypatch.setattr(heads, "BUDGET", 6000)
    model = tiny_model()
    with model.record("attention", layers=[1]) as tape:
        model(torch.tensor([IDS * 4]))
    weights, T = tape["attention", 1][0].numpy(), 160
    picture = explain.attention_maps(model, NUMBERS, IDS * 4, layers=[-1])
    assert picture.layers == [1]
    assert picture.tile > 1
    assert len(picture.packed[0]) <= 6000
    data, n, tile, at = zlib.decompress(picture.packed[0]), picture.maps[0].shape[-1], picture.tile, 0
    some = 0
    for h in range(TINY.n_heads):
        padded = np.pad(weights[h], ((0, n * tile - T), (0, n * tile - T)))
        largest = padded.reshape(n, tile, n, tile).max((1, 3))
        assert np.abs((picture.maps[0][h] / 255.0) ** 2 - largest).max() < 0.004
        at += n * (n + 1) // 2
        counts = np.frombuffer(data, np.uint8, T, at)
        E, at = int(counts.sum()), at + T
        low, high, codes = (np.frombuffer(data, np.uint8, E, at + i * E).astype(int) for i in range(3))
        queries, at = np.repeat(np.arange(T), counts), at + 3 * E
        kept = weights[h][queries, queries - low - 256 * high]
        assert np.abs((codes / 255) ** 2 - kept).max(initial=0) < 0.004
        assert kept.sum() / T == pytest.approx(picture.heads[0][h].covered, abs=1e-4)
        some += E
    assert some > 100
    assert at == len(data)


def test_the_last_row_of_the_lens_is_the_models_output(demo: tuple[Mistral7B, Tokenizer]) -> None:
    for model, tokenizer, prompt in (
        (*demo, "def add(a, b):\n    return a"),
        (Mistral7B.from_pretrained("demo", quantization="int8"), demo[1], HOSTILE),
    ):
        ids = tokenizer.encode(prompt)
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), Stateless(model.args.sliding_window))[0]
            with model.record("residual", layers=[-1]) as tape:
                model.hidden(torch.tensor([ids]), Stateless(model.args.sliding_window))
            (last,) = lens.lens_logits(model, tape["residual", -1])
        assert torch.equal(last, logits)
        best = logits[0].log_softmax(-1).topk(5)
        row = explain.logit_lens(model, tokenizer, prompt).rows[-1]
        assert row.ids == best.indices.tolist()
        assert row.probabilities == best.values.exp().tolist()


def test_probabilities_are_the_models(demo: tuple[Mistral7B, Tokenizer]) -> None:
    model, tokenizer = demo
    picture = explain.token_probabilities(model, tokenizer, HOSTILE)
    ids = tokenizer.encode(HOSTILE)
    table = model(torch.tensor([ids]))[0][0].softmax(-1)
    for i, predicted in enumerate(picture.predictions):
        assert predicted.probability == pytest.approx(table[i, ids[i + 1]].item(), rel=1e-4)
        assert predicted.alternatives[0][1] == pytest.approx(table[i].max().item(), rel=1e-4)
        assert len(predicted.alternatives) == 8
    assert picture.following[0][0] == tokenizer.piece(int(table[-1].argmax()))


def test_attributions_have_the_sum_that_they_state() -> None:
    model = tiny_model(dtype=torch.float64)
    picture = explain.attributions(model, NUMBERS, IDS, target=5, leave_out=[0, 33, 39])
    assert picture.gradients is not None
    assert not picture.gradients.rounded
    assert sum(picture.gradients.values) == pytest.approx(picture.gradients.difference, rel=0.01)
    score = model(torch.tensor([IDS]))[0][0, -1].log_softmax(-1)[5].item()
    assert picture.log_probability == pytest.approx(score)
    assert list(picture.left_out) == [0, 33, 39]
    for i, fall in picture.left_out.items():
        without = model(torch.tensor([IDS[:i] + IDS[i + 1 :]]))[0][0, -1].log_softmax(-1)[5].item()
        assert fall == pytest.approx(score - without)
    # Two layers with a window of 8 carry nothing further than 14 positions.
    assert not any(picture.gradients.values[: 40 - 2 * 8 + 1])
    assert any(picture.gradients.values[-8:])


def test_the_trace_is_that_of_the_caches(demo: tuple[Mistral7B, Tokenizer]) -> None:
    model, tokenizer = demo
    picture = explain.cache_trace(model, tokenizer, [1, *range(100, 399)], max_tokens=24)
    events = [event for step in picture.steps for event in step.events]
    assert "A starts: no cached prefix" in events
    assert "B starts: prefix hit, 288 tokens are not computed" in events
    assert any("left the window" in event for event in events)
    assert sum(step.fed.get("A", 0) for step in picture.steps) == 300 + 23  # the last token is not fed
    assert sum(step.fed.get("B", 0) for step in picture.steps) == 12 + 23
    assert any(page.holders == "AB" for step in picture.steps for page in step.pages)
    assert not any(page.holders for page in picture.steps[-1].pages)
    assert any(page.number is not None for page in picture.steps[-1].pages)
    assert picture.slots == 256
    assert [count for count, _ in picture.ring] == [300, *[1] * 23]
    assert picture.ring[1][1] == [(300 % 256, 300)]


def test_operators_cover_the_step() -> None:
    for quantization, fused in ((None, False), ("int8", True)):
        model = Mistral7B.from_pretrained("demo", quantization=quantization)
        picture = explain.step_times(model, NUMBERS, [1, 2, 3], bandwidth=1e10, peak=1e11)
        assert picture.fused == fused
        assert [o.name for o in picture.whole] == [
            "embedding", "all layers", "final norm", "output projection", operators.OTHER
        ]  # fmt: skip
        assert sum(o.seconds for o in picture.whole) >= 0.999 * picture.seconds
        assert sum(o.seconds for o in picture.split) >= 0.999 * picture.split_seconds
        by_name = {o.name: o for o in picture.split}
        layers = sum(by_name[key].bytes for key in (*operators.BLOCK, operators.ATTENTION))
        assert picture.whole[1].bytes == layers
        assert by_name["attention.wq"].operations == 6 * 2 * 320 * 256
        assert all(o.seconds > 0 for o in picture.split if o.name != operators.OTHER)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_pages_are_one_safe_document(demo: tuple[Mistral7B, Tokenizer]) -> None:
    picture = explain.token_probabilities(*demo, "x = 1")
    page = dataclasses.replace(picture, tokens=[HOSTILE, *picture.tokens[1:]]).html()  # a token that is all of it
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert not re.search(r"""(src|href)=|url\(|https?://""", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert data["tokens"][0] == HOSTILE
    assert "<!--data-->" not in page
    assert "srcdoc=" in picture._repr_html_()


@pytest.mark.parametrize(
    ("act", "field"),
    [
        (lambda m: explain.attention_maps(m, NUMBERS, []), "prompt"),
        (lambda m: explain.attention_maps(m, NUMBERS, [99]), "prompt"),
        (lambda m: explain.logit_lens(m, NUMBERS, IDS, layers=[2]), "layers"),
        (lambda m: explain.attributions(m, NUMBERS, IDS, target=67), "target"),
        (lambda m: explain.attributions(m, NUMBERS, IDS, leave_out=[40]), "leave_out"),
        (lambda m: explain.cache_trace(m, NUMBERS, IDS, max_tokens=1), "max_tokens"),
        (lambda m: explain.attention_maps(m, NUMBERS, IDS).save("a.gif"), "output"),
    ],
)
def test_what_cannot_be_drawn_is_refused(act, field: str) -> None:
    with pytest.raises(InterpretError) as caught:
        act(tiny_model())
    assert caught.value.field == field


def test_a_png_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InterpretError):
        explain.attention_maps(tiny_model(), NUMBERS, IDS).save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["attention", "probabilities", "lens", "attribution", "cache"])
def test_the_command_writes_both_files(what: str, tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        target = tmp_path / f"a.{suffix}"
        assert main(["explain", "demo", HOSTILE, "--what", what, "-o", str(target)]) == 0
        assert target.read_bytes().startswith(b"<!doctype html>" if suffix == "html" else b"\x89PNG")


def test_wrong_flags_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for flags in (["--target", "x"], ["--what", "lens", "--max-tokens", "3"], ["-o", str(tmp_path / "a.gif")]):
        assert main(["explain", "demo", "x", *flags]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_the_snippet_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "explain.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/explain.md", "exec"), {})
    assert (tmp_path / "lens.html").stat().st_size > 10_000


def test_spaces_of_tokens_are_seen_in_a_plot() -> None:
    assert plotted(" in") == "·in"
    assert plotted("in") == "in"
