"""Supervised fine-tuning: what an update learns, resuming, and what is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finetune_data import VOCABULARY, base_model, examples, tokenizer
from refusals import refused

from mistral_7b import AdapterError, TrainingError
from mistral_7b.cache import Stateless
from mistral_7b.lora.files import read_adapter
from mistral_7b.training.finetune_args import FinetuneArgs
from mistral_7b.training.finetuning import Examples, Run
from mistral_7b.training.loop import Loop
from mistral_7b.training.measures import Forgetting, Measures
from mistral_7b.training.supervised import pack
from mistral_7b.training.weights import Weights

ARGS = FinetuneArgs(
    steps=6,
    seq_len=32,
    rows=4,
    accumulate=4,
    warmup=2,
    lr=1e-2,
    rank=4,
    dtype="float32",
    save_every=2,
    log_every=99,
)


def args_of(out: Path | str = "unused", **changes: Any) -> FinetuneArgs:
    return dataclasses.replace(ARGS, **{"out": str(out), **changes})


def loop_of(**changes: Any) -> Loop:
    args = args_of(**changes)
    return Run(
        args, base_model(args.method == "full").to(getattr(torch, args.dtype)), tokenizer(), Examples(examples())
    ).loop


def run(out: Path, show: Any = lambda record: None, held_out: int = 0, **changes: Any) -> dict[str, Any]:
    """Train the tiny model on `examples`, of which the last `held_out` are evaluated."""
    args, items = args_of(out, **{"samples": 0, **changes}), examples()
    given = Examples(items[: len(items) - held_out], (), items[len(items) - held_out :])
    return Run(args, base_model(args.method == "full").to(getattr(torch, args.dtype)), tokenizer(), given).train(
        show
    )


def hash_of(out: Path) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("lr", [1e9, 11.0, 0.0, math.inf])
def test_an_absurd_learning_rate_is_refused(lr: float) -> None:
    with refused(TrainingError, field="lr"):
        FinetuneArgs(lr=lr)


def test_the_loss_is_that_of_each_document_alone_over_its_trained_tokens() -> None:
    """From the items by themselves: nothing of the packed batch is used but which items it has."""
    loop = loop_of()
    losses, trained, places = 0.0, 0, 0
    for part in loop.method.packed.parts(0, ARGS.rows, ARGS.accumulate):
        assert len(part) > 1, "a document alone in its row cannot see another"
        for ids, is_trained in (loop.method.documents[i] for i in part):
            tokens = torch.from_numpy(ids).long()
            logits = loop.method.model(tokens[None, :-1])[0][0].detach()
            nll = F.cross_entropy(logits, tokens[1:], reduction="none")
            losses += float(nll[torch.from_numpy(is_trained[1:])].sum())
            trained, places = trained + int(is_trained[1:].sum()), places + len(nll)
    assert 0 < trained < places, "prompts are not trained"
    assert loop.update()["loss"] == pytest.approx(losses / trained, rel=1e-5)


def test_packing_keeps_every_trained_token_with_its_context() -> None:
    documents = examples(3)
    packed = pack(documents)
    assert len(packed.tokens) == sum(len(d.ids) - 1 for d in documents)
    assert packed.targets[packed.targets != -100].tolist() == [int(t) for d in documents for t in d.ids[d.trained]]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trap_20_one_part_of_eight_rows_is_eight_parts_of_one(method: str) -> None:
    found = []
    for accumulate in (1, 8):
        loop = loop_of(method=method, rows=8, accumulate=accumulate, clip=1e9)
        counts = {int((b.targets != -100).sum()) for b in loop.method.micro_batches(0)}
        assert accumulate == 1 or len(counts) > 1, "a mean of means would differ"
        seen: list[torch.Tensor] = []
        loop.weights.optimizers[0].register_step_pre_hook(
            lambda *_, loop=loop, seen=seen: seen.extend(m.grad.clone() for m in loop.weights.masters)
        )
        record = loop.update()
        found.append((record["loss"], seen))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_trap_27_editing_one_document_leaves_the_next_bit_equal() -> None:
    loop = loop_of(rows=1, accumulate=1)
    model, (batch,) = loop.method.model, loop.method.micro_batches(0)
    edited = batch.tokens.clone()
    edited[2] = (edited[2] + 1) % VOCABULARY
    before, after = (model.hidden(t, Stateless(8), batch.sequence_ids) for t in (batch.tokens, edited))
    others = batch.sequence_ids > 0
    assert others.any()
    assert before[others].equal(after[others])
    assert not before[~others].equal(after[~others])


def test_training_learns_the_answers(tmp_path: Path) -> None:
    losses: list[float] = []
    run(tmp_path / "run", show=lambda record: losses.append(record["loss"]), steps=60, lr=2e-2)
    assert losses[-1] < 0.5 * losses[0]


def test_trap_30_one_seed_gives_one_adapter(tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 1})):
        run(tmp_path / name, dropout=0.2, steps=3, **changes)
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "b") != hash_of(tmp_path / "c")
    assert len(read_adapter(tmp_path / "a" / "adapter", base_model().args).targets) == 14


def test_each_update_has_other_dropout() -> None:
    """With no learning and the same data, the losses of two updates differ by their masks alone."""
    loop = loop_of(dropout=0.5, lr=1e-30)
    with torch.no_grad():
        for p in loop.weights.weights:
            p.fill_(0.1)  # the adapter has an effect, and dropout with it
    rows = loop.method.packed.parts(0, ARGS.rows, ARGS.accumulate)
    loop.method.packed.parts = lambda step, *_: rows
    first, second = loop.update()["loss"], loop.update()["loss"]
    assert first != second
    loop.step = 0
    assert loop.update()["loss"] == first


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stopped_run_resumes_and_ends_in_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["step"] == stop_at:
            raise KeyboardInterrupt

    run(tmp_path / "whole", dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", show=stop, dropout=0.1)
    shown: list[int] = []
    run(tmp_path / "cut", show=lambda record: shown.append(record["step"]), dropout=0.1)
    assert shown == list(range(stop_at + 1, 7))
    assert hash_of(tmp_path / "whole") == hash_of(tmp_path / "cut")


def test_the_last_k_states_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=5, save_every=1, keep=2)
    states = sorted(p.name for p in (tmp_path / "run").glob("state*"))
    assert states == ["state-000004.pt", "state-000005.pt", "state.pt"]
    assert torch.load(tmp_path / "run" / "state-000004.pt", weights_only=True)["step"] == 4


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=2)
    with refused(TrainingError, field="rank", place=tmp_path / "run" / "state.pt"):
        run(tmp_path / "run", steps=2, rank=2)


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=2, held_out=4)
    with refused(TrainingError, field="data", place=tmp_path / "run" / "state.pt"):
        run(tmp_path / "run", steps=2, held_out=5)


def test_a_run_shorter_than_its_warmup_can_be_lengthened(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=1, warmup=3)
    assert [args_of(steps=2, warmup=3).learning_rate(step) for step in (0, 1)] == [0.5, 1.0]
    assert run(tmp_path / "run", steps=4, warmup=3)["step"] == 4


@pytest.mark.parametrize("moment", ["update", "evaluation"])
def test_a_run_interrupted_within_an_update_or_evaluation_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    changes = {"held_out": 4, "eval_every": 1, "steps": 3, "save_every": 1}
    owner, name = (Weights, "publish") if moment == "update" else (Measures, "__call__")
    whole, calls = getattr(owner, name), 0

    def interrupted(self: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return whole(self)

    wanted = run(tmp_path / "whole", **changes)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", **changes)
    last = run(tmp_path / "cut", **changes)
    assert hash_of(tmp_path / "whole") == hash_of(tmp_path / "cut")
    assert last["eval_loss"] == wanted["eval_loss"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert [log.count("eval_loss") for log in logs] == [3, 3]


def test_a_rank_beyond_the_width_is_refused(tmp_path: Path) -> None:
    with refused(AdapterError, field="rank"):
        run(tmp_path / "run", rank=100_000)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": float("inf")}, "lr"),
        ({"accumulate": 3}, "rows"),
        ({"warmup": -1}, "warmup"),
        ({"seed": -1}, "seed"),
        ({"final_lr": float("nan")}, "final_lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"dropout": 1.0}, "dropout"),
        ({"method": "full", "quantization": "int8"}, "quantization"),
        ({"method": "grpo"}, "reward"),
        ({"patience": 2}, "patience"),
        ({"targets": ("wq", "q_proj")}, "targets"),
        ({"held_out": "1.5"}, "held_out"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with refused(TrainingError, field=field):
        args_of(**changes)


def test_little_data_is_warmed_up_for_as_long_as_it_lasts(tmp_path: Path) -> None:
    rates: list[float] = []
    run(tmp_path / "run", lambda record: rates.append(record["lr"]), steps=None, warmup=50)
    assert 1 < len(rates) < 50
    assert rates == pytest.approx([ARGS.peak * (i + 1) / len(rates) for i in range(len(rates))])


def test_recomputed_blocks_give_the_same_bits(tmp_path: Path) -> None:
    for name, blocks in (("kept", 0), ("one", 1), ("all", 9)):
        run(tmp_path / name, dropout=0.2, steps=2, recompute=blocks)
    assert hash_of(tmp_path / "kept") == hash_of(tmp_path / "one") == hash_of(tmp_path / "all")


def test_masters_gather_what_bfloat16_would_lose() -> None:
    loop = loop_of(method="full", dtype="bfloat16", lr=1e-6, warmup=0)
    before = [w.detach().float() for w in loop.weights.weights]
    for _ in range(2):
        loop.update()
    moved = rounded = total = 0
    for name, old, master, weight in zip(
        loop.weights.names, before, loop.weights.masters, loop.weights.weights, strict=True
    ):
        if name.startswith("layers."):
            moved += int((master != old).sum())
            rounded += int((weight.float() != old).sum())
            total += old.numel()
    assert moved > 0.99 * total
    assert rounded < 0.1 * total


def test_what_was_forgotten_is_the_kl_from_the_model_before() -> None:
    model = base_model()
    forgetting = Forgetting(model, tokenizer())
    assert forgetting.kl() == 0
    before = model(forgetting.tokens, Stateless(8))[0].double().log_softmax(-1)
    with torch.no_grad():
        model.output.weight *= 1.1
    now = model(forgetting.tokens, Stateless(8))[0].double().log_softmax(-1)
    wanted = (before.exp() * (before - now)).sum(-1).mean()
    assert forgetting.kl() == pytest.approx(float(wanted), rel=1e-4)
    assert len(forgetting.tokens) == 256


def test_another_run_in_a_folder_of_torchrun_is_named_with_that_folder(tmp_path: Path) -> None:
    args = FinetuneArgs(data=("x.jsonl",), out=str(tmp_path))
    saved = {"args": json.dumps({**args.as_json(), "method": "dpo"}), "folder": str(tmp_path / "shards-000002")}
    run: Any = SimpleNamespace(weights=SimpleNamespace(read=lambda path, device: saved), args=args, data={})
    with refused(TrainingError, field="method", place=tmp_path / "shards-000002"):
        Loop.resume(run, tmp_path / "state.pt", "cpu")
