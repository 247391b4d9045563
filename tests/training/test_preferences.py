"""DPO and KTO: batches, references and gradients, without another library (test_preferences_trl.py has TRL's)."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_data import encoded, pairs, thumbs
from refusals import refused
from tiny import tiny_args, tiny_model
from torch import Tensor

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.errors import TrainingError
from mistral_7b.lora.files import read_adapter
from mistral_7b.training import loss
from mistral_7b.training.finetune_args import FinetuneArgs
from mistral_7b.training.finetuning import Examples, Run, Setting, build_method, open_trained
from mistral_7b.training.log_probs import ModelPolicy, consecutive, log_probs
from mistral_7b.training.preferences import DPO, KTO, mismatched
from mistral_7b.training.supervised import pack

ARGS = FinetuneArgs(
    method="dpo", seq_len=64, rows=4, accumulate=4, rank=4, lr=1e-2, warmup=0, steps=4, dtype="float32", samples=0
)  # fmt: skip
BIG = tiny_args(vocab_size=Tokenizer.from_pretrained("demo").vocab_size)  # what is forgotten is measured on text
ITEMS: dict[str, Any] = {"dpo": pairs(12), "kto": thumbs(16)}


def method(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[DPO | KTO, Mistral7B]:
    """A method on an adapted model, whose adapter changes it."""
    args = dataclasses.replace(ARGS, **changes)
    model, tokenizer = tiny_model(tiny_args(), dtype), Tokenizer.from_pretrained("demo")
    weights = open_trained(args, model, tokenizer).weights
    made: Any = build_method(Setting(args, model, tokenizer, ITEMS[args.method]))
    noise = torch.Generator().manual_seed(0)
    for p in weights.weights:
        p.data += 0.1 * torch.randn(p.shape, generator=noise)
    return made, model


def gradients(made: DPO | KTO, model: Mistral7B, step: int = 0) -> tuple[dict[str, float], Tensor]:
    """The sums of the logs of an update's batches, and its gradient."""
    model.zero_grad()
    logs = [made.backward(batch) for batch in made.micro_batches(step)]
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {name: sum(log[name] for log in logs) for name in logs[0]}, torch.cat(found)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_parts_of_an_update_add_up_to_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = method(method=name, accumulate=4)
    assert len({len(batch.packed.tokens) for batch in made.micro_batches(0)}) > 1, "a mean of means would differ"
    split = gradients(made, model)
    made.accumulate = 1
    monkeypatch.setattr(loss, "LOGITS", 3 * tiny_args().vocab_size)
    whole = gradients(made, model)
    assert split[0] == pytest.approx(whole[0])
    torch.testing.assert_close(split[1], whole[1])
    assert split[1].abs().max() > 1e-4


@pytest.mark.parametrize(("name", "kind"), [("dpo", "sigmoid"), ("dpo", "ipo"), ("kto", "sigmoid")])
def test_the_gradient_is_the_slope_of_the_loss(name: str, kind: str) -> None:
    made, model = method(method=name, loss=kind)
    _, slope = gradients(made, model)
    factors = [p for p in model.parameters() if p.requires_grad]
    direction = slope / slope.norm()
    losses = []
    for step in (1e-4, -2e-4):
        at = 0
        with torch.no_grad():
            for p in factors:
                p += step * direction[at : at + p.numel()].view_as(p)
                at += p.numel()
        losses.append(gradients(made, model)[0]["loss"])
    assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(float(slope.norm()), rel=1e-3)


def test_references_are_computed_once_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = method()
    calls: list[int] = []
    hidden = made.references.policy.hidden
    monkeypatch.setattr(
        made.references.policy, "hidden", lambda batch: calls.append(len(batch.tokens)) or hidden(batch)
    )
    first = made.micro_batches(0)
    assert len(calls) == first[0].n
    again = made.micro_batches(0)
    assert len(calls) == first[0].n
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.reference, b.reference)
    other, _ = method(seed=7)
    for each in (other, made):
        each.micro_batches(3)
    shared = set(made.references.kept) & set(other.references.kept)
    assert shared
    assert all(torch.equal(made.references.kept[i], other.references.kept[i]) for i in shared)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_before_training_the_policy_is_the_reference(name: str, tmp_path: Path) -> None:
    """Also where training goes on from an adapter, which then is part of the reference."""
    args = dataclasses.replace(ARGS, method=name, out=str(tmp_path), steps=3)
    tokenizer = Tokenizer.from_pretrained("demo")
    Run(args, tiny_model(BIG), tokenizer, Examples(ITEMS[name])).train(lambda record: None)
    start = str(tmp_path / "adapter")
    model = tiny_model(BIG)
    open_trained(dataclasses.replace(args, start=start), model, tokenizer)
    made: Any = build_method(Setting(dataclasses.replace(args, start=start), model, tokenizer, ITEMS[name]))
    assert any(f.b.any() for f in read_adapter(start, model.args).targets.values())
    log, _ = gradients(made, model)
    assert log["loss"] == pytest.approx(np.log(2) if name == "dpo" else 0.5, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_run_learns_is_measured_and_resumes_with_the_same_bits(name: str, tmp_path: Path) -> None:
    hashes, last = [], {}
    for folder, stops in (("whole", (8,)), ("resumed", (5, 8))):
        for steps in stops:
            args = dataclasses.replace(ARGS, method=name, out=str(tmp_path / folder), steps=steps, final_lr=1.0)
            examples = Examples(ITEMS[name], held_out=ITEMS[name])
            last = Run(args, tiny_model(BIG), Tokenizer.from_pretrained("demo"), examples).train(
                lambda record: None
            )
        file = tmp_path / folder / "adapter" / "adapter_model.safetensors"
        hashes.append(hashlib.sha256(file.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    assert last["eval_loss"] < (0.5 if name == "dpo" else 0.45)
    assert last.get("eval_accuracy", 1.0) > 0.8


def test_a_mismatched_answer_keeps_its_own_prompt() -> None:
    mixed = mismatched(encoded([1, 4, 5], [6, 2]), encoded([1, 7], [8, 9, 2]))
    assert mixed.ids.tolist() == [1, 4, 5, 8, 9, 2]
    assert mixed.trained.tolist() == [False] * 3 + [True] * 3


def test_runs_of_documents_hold_as_many_as_fit() -> None:
    assert [(s.start, s.stop) for s in consecutive([3, 4, 9, 1, 1, 1], 7)] == [(0, 2), (2, 3), (3, 6)]
    assert list(consecutive([], 7)) == []


def test_only_the_trained_tokens_have_a_log_probability() -> None:
    model = tiny_model()
    batch = pack([encoded([1, 4, 5], [6, 2]), encoded([1, 7], [8, 2])])
    found = log_probs(ModelPolicy(model), batch)
    wanted = [
        model(torch.tensor(ids))[0].log_softmax(-1)[[at - 1 for at in places], [ids[at] for at in places]]
        for ids, places in (([1, 4, 5, 6, 2], [3, 4]), ([1, 7, 8, 2], [2, 3]))
    ]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)


def test_thumbs_that_all_point_one_way_are_refused() -> None:
    good = [item for item in ITEMS["kto"] if item.good]
    args = dataclasses.replace(ARGS, method="kto")
    model = tiny_model()
    open_trained(args, model, Tokenizer.from_pretrained("demo"))
    with refused(TrainingError, field="data"):
        build_method(Setting(args, model, Tokenizer.from_pretrained("demo"), good))


def test_a_single_answer_has_no_other_to_compare_with() -> None:
    made, _ = method(method="kto", rows=1, accumulate=1, seq_len=12)
    with refused(TrainingError, field="rows"):
        for step in range(20):
            made.micro_batches(step)
