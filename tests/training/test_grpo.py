"""GRPO: what is sampled and rated, the gradients of an update, the gate, and resuming."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model

from mistral_7b import Tokenizer
from mistral_7b.errors import TrainingError
from mistral_7b.training.encoding import Prompt
from mistral_7b.training.exact import serve
from mistral_7b.training.finetune_args import FinetuneArgs
from mistral_7b.training.finetuning import Examples, Run, Setting, open_trained
from mistral_7b.training.grpo import GRPO, Rollout, Sampler, advantages_of, method_of
from mistral_7b.training.rewards import Reward

ARGS = FinetuneArgs(
    method="grpo", reward="unused.py:reward", rows=3, accumulate=1, group=4, max_tokens=8, seq_len=64, rank=8,
    alpha=16.0, lr=2e-2, warmup=0, steps=12, samples=0,
)  # fmt: skip
ITEMS = [Prompt(np.array([1, 5 + i], np.int32), {"prompt": str(i)}) for i in range(6)]


class Numbers(Tokenizer):
    """A tokenizer whose text of token 5 is " 5"."""

    def __init__(self) -> None:
        """Without a file."""

    stop_ids = frozenset((2,))  # type: ignore[assignment]

    def stream(self, after: Any = ()) -> Any:
        return self

    def push(self, token: int) -> str:
        return f" {token}"

    def flush(self) -> str:
        return ""

    def piece(self, token: int) -> str:
        return f" {token}"


def low_tokens(prompt: str, completions: list[str], row: dict[str, Any]) -> list[float]:
    """The share of tokens below 30."""
    assert prompt == row["prompt"]
    return [float(np.mean([int(token) < 30 for token in text.split()] or [0.0])) for text in completions]


def method(folder: Path | None = None, **changes: Any) -> tuple[GRPO, Any]:
    """GRPO of a tiny model, and its weights."""
    args = dataclasses.replace(ARGS, **changes)
    model = tiny_model(tiny_args(), torch.bfloat16)
    tokenizer = Numbers()
    weights = open_trained(args, model, tokenizer).weights
    return GRPO(Sampler(model, tokenizer, Reward(low_tokens), args, 2), ITEMS, folder=folder), weights


def update(grpo: GRPO, weights: Any, step: int) -> dict[str, float]:
    logs = [grpo.backward(batch) for batch in grpo.micro_batches(step)]
    weights.collect(1.0)
    weights.update(1.0)
    return logs[0]


def gradients(weights: Any) -> list[torch.Tensor]:
    """The gradients, which are cleared."""
    found = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights.weights]
    for w in weights.weights:
        w.grad = None
    return found


def test_it_learns_what_is_rewarded(capsys: pytest.CaptureFixture[str]) -> None:
    grpo, weights = method()
    logs = [update(grpo, weights, step) for step in range(ARGS.steps or 0)]
    assert logs[0]["reward"] < 0.6 < 0.8 < logs[-1]["reward"]
    assert "agree in every bit" in capsys.readouterr().err, "what exactness costs is printed"


def test_trap_29_a_policy_that_is_not_the_sampler_is_caught() -> None:
    grpo, weights = method()
    (batch, *_) = grpo.micro_batches(0)
    with torch.no_grad():
        weights.weights[1][0, 0] += 1e-2
    serve(grpo.sampler.model, grpo.sampler.engine)
    with refused(TrainingError, field="method"):
        grpo.backward(batch)


def test_completions_of_a_group_differ_and_those_of_a_seed_do_not() -> None:
    grpo, _ = method()
    first, again, other = (grpo.sampler.sample(ITEMS[:2], *seed)[0] for seed in ((0, 1), (0, 1), (0, 2)))
    assert first == again
    assert first != other
    assert len({tuple(r.tokens) for r in first[:4]}) > 1
    assert [r.prompt for r in first] == [item.ids.tolist() for item in ITEMS[:2] for _ in range(4)]
    assert all(r.text == "".join(f" {t}" for t in r.tokens if t != 2) for r in first)


def test_an_update_is_the_policy_gradient_however_it_is_packed() -> None:
    grpo, weights = method()
    rollouts, _ = grpo.sampler.sample(ITEMS[:3], 0)
    found = []
    for seq_len in (1000, 12):
        grpo.args = dataclasses.replace(grpo.args, seq_len=seq_len)
        grpo.rollouts = {0: rollouts}
        grpo._rollouts = lambda number, age: (rollouts, {})  # type: ignore[method-assign]
        batches = grpo.micro_batches(0)
        found.append((len(batches), sum(grpo.backward(b)["loss"] for b in batches), gradients(weights)))
    assert found[0][0] < found[1][0]
    tokens = sum(len(r.tokens) for r in rollouts)
    assert found[0][1] == pytest.approx(-sum(r.advantage * len(r.tokens) for r in rollouts) / tokens, abs=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-6)
    whole, split = (torch.cat([g.flatten() for g in one[2]]) for one in found)
    assert torch.cosine_similarity(whole, split, dim=0) > 0.999


def test_clipping_stops_tokens_that_moved_in_their_favoured_direction() -> None:
    grpo, weights = method()
    (batch, *_) = grpo.micro_batches(0)
    for shift, advantage, moves in ((1, 1, False), (1, -1, True), (-1, 1, True), (-1, -1, False), (0.1, 1, True)):
        moved = batch._replace(
            sampled=batch.sampled - shift,
            advantages=torch.full_like(batch.advantages, advantage),
            fresh=False,
        )
        log = grpo.backward(moved)
        assert any(g.any() for g in gradients(weights)) == moves, (shift, advantage)
        assert (log["clipped"] > 0) != moves


def test_the_kl_of_an_adapter_that_changes_nothing_is_exactly_zero() -> None:
    grpo, weights = method(beta=0.1)
    log = update(grpo, weights, 0)
    assert log["kl"] == 0.0
    assert update(grpo, weights, 1)["kl"] > 0.0


def test_several_updates_on_the_same_completions_resume(tmp_path: Path) -> None:
    grpo, weights = method(tmp_path, sample_every=2)
    update(grpo, weights, 0)
    second = grpo.micro_batches(1)
    assert not second[0].fresh
    resumed, _ = method(tmp_path, sample_every=2)
    for mine, theirs in zip(second, resumed.micro_batches(1), strict=True):
        assert torch.equal(mine.sampled, theirs.sampled)
        assert torch.equal(mine.packed.tokens, theirs.packed.tokens)
    assert grpo.micro_batches(2)[0].fresh
    with refused(TrainingError):
        resumed.micro_batches(5)


def test_equal_rewards_have_exactly_no_advantage() -> None:
    assert advantages_of([0.1] * 3, scaled=True) == [0.0] * 3
    assert advantages_of([1.0, 0.0, 2.0], scaled=False) == [0.0, -1.0, 1.0]
    assert advantages_of([1.0, 0.0, 2.0], scaled=True) == pytest.approx([0.0, -0.9999, 0.9999])


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    model: Any = None
    with refused(TrainingError, field="seq_len"):
        method_of(Setting(dataclasses.replace(ARGS, seq_len=9), model, Numbers(), ITEMS))


def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    reward = tmp_path / "rewards.py"
    reward.write_text("def short(prompt, completions, row):\n    return [-len(c) for c in completions]\n")
    hashes = []
    for name, stops in (("whole", (4,)), ("resumed", (3, 4))):
        for steps in stops:
            args = dataclasses.replace(
                ARGS, out=str(tmp_path / name), reward=f"{reward}:short", steps=steps, sample_every=2, final_lr=1.0
            )
            tokenizer = Tokenizer.from_pretrained("demo")
            model = tiny_model(tiny_args(vocab_size=tokenizer.vocab_size), torch.bfloat16)
            Run(args, model, tokenizer, Examples(ITEMS)).train(lambda record: None)
        file = tmp_path / name / "adapter" / "adapter_model.safetensors"
        hashes.append(hashlib.sha256(file.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    kept = (tmp_path / "whole" / "completions" / "000001.json").read_text(encoding="utf-8")
    assert '"reward"' in kept
    assert Rollout.__dataclass_fields__.keys() >= {"text", "advantage"}
