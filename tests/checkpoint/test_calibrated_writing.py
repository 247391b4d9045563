"""Calibration layer by layer during writing is bit-identical to calibrating the whole model."""

from __future__ import annotations

import pathlib

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of

from mistral_7b import Mistral7B, QuantizationError, Tokenizer
from mistral_7b.checkpoint import hub, load, quantize, read_record
from mistral_7b.cli.quantize import documents, own_source, rows
from mistral_7b.quantization import Scheme, calibrate

TEXT = tokens_of((3, 20))
GUIDE = [tokens_of((n,), seed=n).tolist() for n in (30, 30, 7)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("q4_k_m")], ids=str)
def test_calibrated_writing_equals_calibration_in_memory(
    tmp_path: pathlib.Path, scheme: Scheme, layout: str, tied: bool
) -> None:
    plain = tiny_model(tiny_args(tie_embeddings=tied), torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain", format=layout)
    before = {f.name: f.read_bytes() for f in (tmp_path / "plain").iterdir()}
    record = quantize(
        tmp_path / "plain", tmp_path / "out", scheme, TEXT, "a text",
        calibration_tokens=[*GUIDE, []], calibration_text="a guide",
    )  # fmt: skip
    assert record.calibration == {"method": "feedback", "tokens": 67, "text": "a guide"}
    assert read_record(tmp_path / "out") == record
    assert {f.name: f.read_bytes() for f in (tmp_path / "plain").iterdir()} == before
    wanted = calibrate(load(tmp_path / "plain"), GUIDE, scheme)
    made, state = load(tmp_path / "out"), wanted.state_dict()
    assert made.state_dict().keys() == state.keys()
    for name, value in made.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.inference_mode():
        logits = [m(TEXT)[0][:, :-1].double().log_softmax(-1) for m in (load(tmp_path / "plain"), made)]
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
    assert record.distance["kl"] == pytest.approx(kl, rel=0.1)  # bfloat16 logits
    nearest = quantize(tmp_path / "plain", tmp_path / "nearest", scheme, TEXT, "a text")
    assert nearest.calibration is None
    assert any(not torch.equal(v, state[n]) for n, v in load(tmp_path / "nearest").state_dict().items())


def test_calibration_is_closer_to_the_bundled_model_than_rounding(tmp_path: pathlib.Path) -> None:
    demo, tokenizer = hub.resolve("demo"), Tokenizer.from_pretrained("demo")
    guide = documents(tokenizer, [pathlib.Path(pathlib.__file__).read_text(encoding="utf-8")], 2000, 512)
    assert sum(map(len, guide)) == 2000
    held_out = rows(tokenizer, own_source()[1], 1024, 512)
    calibrated, nearest = (
        quantize(demo, tmp_path / name, "int4", held_out, "own source", calibration_tokens=tokens).distance
        for name, tokens in (("calibrated", guide), ("nearest", None))
    )
    assert calibrated["kl"] < 0.7 * nearest["kl"]
    assert Mistral7B.from_pretrained(tmp_path / "calibrated").args.dim == 320


@pytest.mark.parametrize(
    ("tokens", "guide", "field"),
    [
        (TEXT, [], "calibration_tokens"),
        (TEXT, [[], []], "calibration_tokens"),
        (TEXT, [[1, 67]], "tokens"),
        (TEXT + 60, None, "tokens"),
    ],
)
def test_unusable_calibration_data_is_refused(
    tmp_path: pathlib.Path, tokens: torch.Tensor, guide: list[list[int]] | None, field: str
) -> None:
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    with refused(QuantizationError, field=field):
        quantize(tmp_path / "plain", tmp_path / "out", "int4", tokens, "a text", calibration_tokens=guide)
    assert not (tmp_path / "out").exists()
