"""Training over 1, 2 and 4 processes, beside one: loss, gradients, norm, states, traffic, lost ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from finetune_data import VOCABULARY, examples, tokenizer
from processes import run
from refusals import refused
from tiny import tiny_args, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from waiting import until

from mistral_7b import FinetuneArgs, Mistral7B, ModelArgs, TrainingError
from mistral_7b.distributed import ranks
from mistral_7b.errors import DistributedError
from mistral_7b.training import distributed, plan
from mistral_7b.training.finetuning import Run
from mistral_7b.training.held_out import Examples

SHAPE = tiny_args(dim=64, n_heads=8, n_kv_heads=4, head_dim=16, hidden_dim=96, vocab_size=VOCABULARY + 2)
ARGS = FinetuneArgs(
    method="full", steps=2, seq_len=32, rows=4, accumulate=4, warmup=1, lr=1e-3, rank=4, dtype="float32",
    save_every=1, samples=0, recompute=1,
)  # fmt: skip
WAYS = {"full": ARGS, "lora": dataclasses.replace(ARGS, method="lora", dropout=0.1)}
SENT = {  # collective -> bytes that a rank sends in a ring, of the bytes of what is whole, times W / (W - 1)
    "_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2,
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts what the collectives of this process send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._opname) in SENT:
            tensors = [
                t for a in args[:2] for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)
            ]
            w = dist.get_world_size()
            self.sent += SENT[name] * max(t.nbytes for t in tensors) * (w - 1) / w
        return func(*args, **(kwargs or {}))


def training(args: FinetuneArgs, out: Path) -> Run:
    model = tiny_model(SHAPE, getattr(torch, args.dtype)).requires_grad_(args.method == "full")
    return Run(dataclasses.replace(args, out=str(out)), model, tokenizer(), Examples(examples(), (), []))


def trained(args: FinetuneArgs, out: Path) -> dict[str, Any]:
    """Train; return losses and norms, first gradients, traffic of the second update, and bytes that are held."""
    made = training(args, out)
    first: list[list[torch.Tensor]] = []
    weights, clip = made.loop.weights, made.loop.weights.clip
    weights.clip = lambda most: (clip(most), first.append([m.grad.clone() for m in weights.masters]))[0]  # type: ignore[method-assign, func-returns-value, union-attr]
    updates = [made.loop.update()]
    with Traffic() as traffic:
        updates.append(made.loop.update())
    held = sum(weights.own(p.detach()).nbytes for p in weights.weights) + weights.nbytes()
    return {
        "updates": [(u["loss"], u["norm"]) for u in updates],
        "gradients": [(list(g.shape), float(g.double().square().sum())) for g in first[0]],
        "sent": traffic.sent,
        "held": held,
    }


@pytest.fixture(scope="module", params=[*WAYS, "divided"])
def way(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[int, list[Any]]]:
    """The name of a way to train, and what each rank found by the number of ranks; 0: outside torchrun."""
    folder, args = tmp_path_factory.mktemp("ranks"), WAYS.get(request.param, ARGS)
    found = {0: [trained(args, folder)]}
    for size in (1, 2, 4):
        degree = size if request.param == "divided" else 1
        given = dataclasses.replace(args, tensor_parallel=degree)
        found[size] = run(size, lambda given=given: trained(given, folder), folder)  # type: ignore[misc]
    return request.param, found


def test_loss_gradients_and_norm_are_those_of_one_process(way: tuple[str, dict[int, list[Any]]]) -> None:
    _, found = way
    wanted = found[0][0]
    assert wanted["updates"][0][1] > ARGS.clip, "the norm is clipped"
    for size in (1, 2, 4):
        for rank in found[size]:
            assert rank["updates"] == [pytest.approx(pair, rel=1e-4) for pair in wanted["updates"]]
        for place, (shape, square) in enumerate(wanted["gradients"]):
            parts = [rank["gradients"][place] for rank in found[size]]
            whole = parts[0][0] == shape
            total = parts[0][1] if whole else sum(part for _, part in parts)
            assert total == pytest.approx(square, rel=1e-4)


def test_the_plan_is_what_is_held_and_sent(way: tuple[str, dict[int, list[Any]]]) -> None:
    name, found = way
    if name == "divided":
        return
    for size in (2, 4):
        if name == "full":
            block, output, rest = plan.numbers(SHAPE)
            everything = SHAPE.n_layers * block + output + rest
            sent = plan.shards(ARGS, SHAPE, size).sent * 2  # float32 here
            held = everything * (4 + 8) // size  # weight and master are one
        else:
            sent = plan.replicas(WAYS["lora"], SHAPE, size).sent
            held = plan.trained_numbers(WAYS["lora"], SHAPE) * (4 + 8)
        rank = found[size][0]
        assert rank["sent"] == pytest.approx(sent, rel=0.02)
        extra = held if name == "lora" else everything * 4 // size
        # Weights are counted with their masters, which share memory in float32; steps of AdamW are scalars.
        assert rank["held"] - (extra if name == "full" else held // 3) == pytest.approx(held, rel=0.02)


def resumed(out: Path, steps: int, stop: int) -> list[tuple[float, float]]:
    """Resume the run in `out` and stop it after `stop` updates in all, as a signal does on one rank."""
    made = training(dataclasses.replace(ARGS, steps=steps), out)

    def show(record: dict[str, Any]) -> None:
        if record["step"] == stop - 1 and ranks.rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(KeyboardInterrupt):
        made.train(show)
    return [(r["loss"], r["norm"]) for r in made.loop.log]


def test_a_state_resumes_at_another_number_of_processes(tmp_path: Path) -> None:
    """4 -> 2 -> 1, each interrupted on one rank: the losses of an undisturbed run, and its model."""
    whole = training(dataclasses.replace(ARGS, steps=6), tmp_path / "whole")
    whole.train(lambda record: None)
    wanted = [(r["loss"], r["norm"]) for r in whole.loop.log]
    out = tmp_path / "cut"
    for size, stop in ((4, 2), (2, 4), (1, 99)):
        for log in run(size, lambda stop=stop: resumed(out, 6, stop), tmp_path):  # type: ignore[misc]
            assert log == [pytest.approx(pair, rel=1e-3) for pair in wanted[: min(stop, 6)]]
    assert sorted(p.name for p in out.glob("shards-*")) == ["shards-000006"]
    one, other = (Mistral7B.from_pretrained(p / "model", dtype="float32") for p in (tmp_path / "whole", out))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)  # AdamW moves a weight by the sign of a tiny gradient
    with refused(TrainingError, field="out"):
        training(ARGS, out).train(lambda record: None)  # outside torchrun


def lose(out: Path, number: int, ended: Path) -> Any:
    """Rank 1 gets a signal after two updates; the others say what ends them, and after how long."""
    made = training(dataclasses.replace(ARGS, steps=50), out)
    began = 0.0

    def show(record: dict[str, Any]) -> None:
        nonlocal began
        if record["step"] == 2:
            began = time.monotonic()

    update = made.loop.update

    def stricken() -> Any:
        if ranks.rank() == 1 and made.loop.step == 2:
            os.kill(os.getpid(), number)
            until(ended.exists, 60)  # hangs until rank 0 has given up
        return update()

    made.loop.update = stricken  # type: ignore[method-assign]
    try:
        with ranks.lost_ranks_named():
            made.train(show)
    except DistributedError as error:
        return error.message, time.monotonic() - began
    return None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGWINCH], ids=["killed", "hung"])
def test_a_lost_rank_ends_the_run_and_the_state_is_good(tmp_path: Path, number: int) -> None:
    lost = run(2, lambda: lose(tmp_path / "run", number, tmp_path / "rank-0"), tmp_path, timeout=4.0)
    message, seconds = lost[0]
    assert "rank 0 of 2" in message or message == "reworded"
    assert seconds < 11, "at once, or after the time limit of 4 s"
    assert [p.name for p in (tmp_path / "run").glob("shards-*")] == ["shards-000002"]
    log = run(1, lambda: resumed(tmp_path / "run", 50, 4), tmp_path)[0]
    assert len(log) == 4


def test_processes_that_cannot_share_an_update_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with refused(TrainingError, field="accumulate"):
        distributed.share_of(ARGS)
    with refused(TrainingError, field="tensor_parallel"):
        distributed.share_of(dataclasses.replace(ARGS, tensor_parallel=2))
    with refused(TrainingError, field="tensor_parallel"):
        FinetuneArgs(tensor_parallel=2)
    with refused(TrainingError, field="method"):
        distributed.share_of(FinetuneArgs(method="grpo", reward="a.py:f"))


def test_the_plan_of_the_full_size() -> None:
    """Arithmetic that is known: parameters of Mistral 7B, and the advice when nothing and everything fits."""
    block, output, rest = plan.numbers(ModelArgs())
    assert 32 * block + output + rest == 7_241_732_096
    assert len(plan.ways(ModelArgs(), 10**12, 2048, 4096, 16)) == 15  # tensor parallel by 1, 2, 4 and 8: at once
    found = plan.ways(ModelArgs(), 8, 2048, 4096, 16)
    assert all("nothing fits" in line for line in plan.advice(found, 10**6))
    assert plan.advice(found, 10**12)[0] == "serve: bf16, replicas"
