"""Group relative policy optimization (GRPO, arXiv:2402.03300): learning from rewards of the model's own answers.

    sample    a group of G completions of each prompt, by the engine, from the weights that are trained
    reward    R_i of each completion, by a Python function (rewards.py)
    update    A_i = R_i - mean(R)                                           the group is its own baseline
              L = - sum_it min(rho A_i, clip(rho, 1 - c, 1 + c) A_i) / tokens of the update
              rho = pi(token) / pi_sampled(token)

The advantage is not divided by the group's deviation unless asked: that would weigh most the prompts that are
nearly always or never solved. All tokens of an update weigh the same: a mean over each completion would favour
short right answers and long wrong ones (Dr. GRPO, arXiv:2503.20783; DAPO, arXiv:2503.14476). There is no KL term
unless beta > 0, which then adds beta (exp(d) - d - 1), d = log ref - log pi, an estimate of KL(pi || ref).

In the first update on new completions rho is 1. That holds here exactly: trainer and sampler compute the same bits
(exact.py), which is checked for every token. Later updates on the same completions (`sample_every`) are clipped.
Sampling is at temperature 1 without filters, so that the policy that is trained is the one that sampled.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..engine.inputs import RequestOptions
from ..engine.llm import open_engine, run
from ..engine.request import Request
from ..errors import TrainingError
from ..files import atomic_write
from ..lora.trainable import without_adapter
from ..model import Mistral7B
from ..sampling.params import SamplingParams
from ..text.tokenizer import Tokenizer
from .encoding import Encoded, Prompt
from .exact import ADAPTER, ExactPolicy, cost, serve
from .log_probs import backward, consecutive, log_probs
from .packing import PackedRows
from .rewards import Reward, load_reward
from .supervised import Packed, pack

if TYPE_CHECKING:
    from .finetune_args import FinetuneArgs
    from .finetuning import Setting

PREFILL = 512  # prompt tokens that the engine computes at once
SMALL = 1e-4  # added to a deviation, as in TRL
EVALUATION = 1  # tells its seeds from those of training


@dataclass(frozen=True)
class Rollout:
    """A sampled completion."""

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]  # of its tokens, as they were sampled
    text: str
    reward: float
    advantage: float
    finish_reason: str

    @property
    def document(self) -> Encoded:
        ids = np.array([*self.prompt, *self.tokens], np.int32)
        return Encoded(ids, np.arange(len(ids)) >= len(self.prompt))


class RolloutBatch(NamedTuple):
    """Packed completions, of an update on `n_tokens` sampled tokens."""

    packed: Packed
    sampled: Tensor  # (R,) log-probabilities of the sampler
    advantages: Tensor  # (R,) of each token's completion
    n_tokens: int
    fresh: bool  # whether the weights are those that sampled
    log: dict[str, float]  # of the whole update, in its first batch


class Sampler:
    """The engine that samples completions of prompts from a model in training, and rates them."""

    def __init__(
        self, model: Mistral7B, tokenizer: Tokenizer | None, reward: Reward, args: FinetuneArgs, longest: int
    ) -> None:
        """`model` was prepared (exact.py) and adapted. `longest` prompt: bounds the engine's memory."""
        self.model, self.reward, self.args = model, reward, args
        rows = args.rows * args.group
        config = EngineConfig(
            max_sequences=rows, max_batch_tokens=max(PREFILL, rows + EngineConfig.page_size), deterministic=True
        )
        lengths = [longest + args.max_tokens] * rows
        self.inputs = open_engine(without_adapter(model), config, tokenizer, None, lengths)

    @property
    def engine(self) -> Engine:
        return self.inputs.engine

    def sample(self, prompts: Sequence[Prompt], *seed: int) -> tuple[list[Rollout], dict[str, float]]:
        """A group of completions of each prompt, and what is logged: the same for the same weights and seed."""
        began = time.perf_counter()
        serve(self.model, self.engine)
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64)
        requests = [self._request(*each) for each in zip(prompts, seeds.tolist(), strict=True)]
        run(self.engine, requests)
        sampled = time.perf_counter()
        rollouts = [rollout for each in zip(requests, prompts, strict=True) for rollout in self._rated(*each)]
        log = {"sampling_s": sampled - began, "reward_s": time.perf_counter() - sampled}
        return rollouts, log | _summary(rollouts, self.args.group)

    def _request(self, prompt: Prompt, seed: int) -> Request:
        params = SamplingParams(n=self.args.group, max_tokens=self.args.max_tokens, seed=seed, logprobs=0)
        return self.inputs.text(prompt.ids.tolist(), params, RequestOptions(adapter=ADAPTER))

    def _rated(self, request: Request, prompt: Prompt) -> Iterator[Rollout]:
        """The completions of a prompt with their rewards. Raises the error of a request that failed."""
        if request.error is not None:
            raise request.error
        rewards = self.reward(prompt.row, [c.text for c in request.completions])
        advantages = advantages_of(rewards, self.args.scale_rewards)
        for c, reward, advantage in zip(request.completions, rewards, advantages, strict=True):
            own = [entry[token].logprob for entry, token in zip(c.logprobs, c.token_ids, strict=True)]
            yield Rollout(request.ids, c.token_ids, own, c.text, reward, advantage, str(c.finish_reason))


def advantages_of(rewards: Sequence[float], scaled: bool) -> list[float]:
    """A group's rewards minus their mean; `scaled`, divided by their deviation. Exactly zero for equal rewards."""
    values = np.asarray(rewards, np.float64)
    out = values - values.mean() if np.ptp(values) else np.zeros_like(values)  # a mean may be rounded
    return (out / (values.std(ddof=1) + SMALL) if scaled else out).tolist()


def _summary(rollouts: Sequence[Rollout], group: int) -> dict[str, float]:
    """Means over completions; `flat` is the share of groups with equal rewards, which teach nothing."""
    rewards = np.array([r.reward for r in rollouts]).reshape(-1, group)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(axis=1).mean()),
        "flat": float((np.ptp(rewards, axis=1) == 0).mean()),
        "length": float(np.mean([len(r.tokens) for r in rollouts])),
        "cut": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }


class GRPO:
    """The method: samples when an update needs new completions, and updates on them.

    `folder` keeps the completions of each sampling as JSON: to look at, and to resume between two updates on them.
    """

    def __init__(
        self, sampler: Sampler, items: Sequence[Prompt], copies: Sequence[float] = (), folder: Path | None = None,
        reference: str | None = None,
    ) -> None:  # fmt: skip
        """`reference` is an adapter of the engine; None: its base."""
        self.sampler, self.items, self.args, self.folder = sampler, items, sampler.args, folder
        self.order = PackedRows([1] * len(items), self.args.rows, self.args.seed, copies)  # a row: the prompts
        self.policy = ExactPolicy(sampler.model, sampler.engine)
        self.reference = ExactPolicy(sampler.engine.model, sampler.engine, reference)
        self.beta = self.args.beta or 0.0
        self.rollouts: dict[int, list[Rollout]] = {}  # of the last sampling, by its number
        self.measured = False

    def updates(self, epochs: int) -> int:
        return self.order.rows_of(epochs) * self.args.sample_every

    def micro_batches(self, step: int) -> list[RolloutBatch]:
        """An update's completions; those whose advantage is zero come last, in batches without a gradient."""
        number, age = divmod(step, self.args.sample_every)
        rollouts, log = self._rollouts(number, age)
        n_tokens = sum(len(r.tokens) for r in rollouts)
        useful = [r for r in rollouts if r.advantage or self.beta]
        others = [r for r in rollouts if not (r.advantage or self.beta)]
        out: list[RolloutBatch] = []
        for part in (useful, others):
            for some in consecutive([len(r.prompt) + len(r.tokens) for r in part], self.args.seq_len):
                out.append(self._batch(part[some], n_tokens, age == 0, {} if out else log))
        return out

    def _batch(self, part: Sequence[Rollout], n_tokens: int, fresh: bool, log: dict[str, float]) -> RolloutBatch:
        device = self.policy.device
        sampled = torch.tensor([value for r in part for value in r.log_probs], device=device)
        advantages = torch.tensor([r.advantage for r in part for _ in r.tokens], device=device)
        packed = pack([r.document for r in part]).to(device)
        return RolloutBatch(packed, sampled, advantages, n_tokens, fresh, log)

    def _rollouts(self, number: int, age: int) -> tuple[list[Rollout], dict[str, float]]:
        """The completions of a sampling, after `age` updates on them: sampled if there was none."""
        path = None if self.folder is None else self.folder / f"{number:06}.json"
        if age == 0:
            prompts = [self.items[i] for i in self.order.row(number)]
            rollouts, log = self.sampler.sample(prompts, self.args.seed, number)
            if path is not None:
                with atomic_write(path, folders=True) as beside:
                    beside.write_text(json.dumps([asdict(r) for r in rollouts]), encoding="utf-8")
            self.rollouts = {number: rollouts}
            return rollouts, log
        serve(self.sampler.model, self.sampler.engine)
        if number not in self.rollouts:  # resumed
            if path is None or not path.is_file():
                raise TrainingError(f"the completions of sampling {number} are missing", place=path)
            self.rollouts = {number: [Rollout(**row) for row in json.loads(path.read_text(encoding="utf-8"))]}
        return self.rollouts[number], {}

    def backward(self, batch: RolloutBatch) -> dict[str, float]:
        log: dict[str, float] = {}
        reference = log_probs(self.reference, batch.packed) if self.beta else None

        def objective(values: Tensor) -> Tensor:
            if batch.fresh:
                check_equal(values.detach(), batch.sampled)
            ratio = (values - batch.sampled).exp()
            gain = ratio * batch.advantages
            clipped = ratio.clamp(1 - self.args.ratio_clip, 1 + self.args.ratio_clip) * batch.advantages
            log["clipped"] = (clipped < gain).sum().item() / batch.n_tokens
            gain = torch.minimum(gain, clipped)
            if reference is not None:
                d = reference - values
                kl = d.exp() - d - 1
                log["kl"] = kl.sum().item() / batch.n_tokens
                gain = gain - self.beta * kl
            return -gain.sum() / batch.n_tokens

        loss = backward(self.policy, batch.packed, objective)
        if not self.measured:
            self.measured = True
            print(cost(self.policy, batch.packed), file=sys.stderr)
        return {"loss": loss.item(), "tokens": len(batch.packed.tokens), **log, **batch.log}

    def evaluate(self, items: Sequence[Prompt]) -> dict[str, float]:
        """The mean reward of completions of held-out prompts, sampled with a seed of their own."""
        parts = [items[i : i + self.args.rows] for i in range(0, len(items), self.args.rows)]
        rewards = [
            r.reward
            for number, part in enumerate(parts)
            for r in self.sampler.sample(part, self.args.seed, number, EVALUATION)[0]
        ]
        reward = float(np.mean(rewards))
        return {"eval_loss": -reward, "eval_reward": reward}


def check_equal(trained: Tensor, sampled: Tensor) -> None:
    """TrainingError unless trainer and sampler give the same bits for every token."""
    if not torch.equal(trained, sampled):
        differ = (trained != sampled).sum().item()
        raise TrainingError(
            f"sampler and trainer disagree on {differ} of {len(sampled)} tokens, by up to "
            f"{(trained - sampled).abs().max().item():.3g} in log-probability, and must agree in every bit",
            field="method",
            hint="this is a defect of the package or of the machine; please report it",
        )


def method_of(setting: Setting) -> GRPO:
    """GRPO on `Prompt` items, by the arguments; its completions are kept in the run's folder.

    TrainingError for a prompt that leaves a completion no room, or a reward function that cannot be opened.
    """
    args = setting.args
    longest = max(len(item.ids) for item in setting.items)
    if longest + args.max_tokens > args.seq_len:
        raise TrainingError(
            f"a prompt of {longest} tokens and {args.max_tokens} of a completion exceed seq_len {args.seq_len}",
            field="seq_len",
            hint="raise seq_len, or lower max_tokens",
        )
    sampler = Sampler(setting.model, setting.tokenizer, load_reward(str(args.reward)), args, longest)
    reference = None if args.start is None else "reference"
    if reference is not None:
        sampler.engine.adapters.load(reference, str(args.start))
    return GRPO(sampler, setting.items, setting.copies, Path(args.out) / "completions", reference)
