"""Direct preference optimization (DPO) and Kahneman-Tversky optimization (KTO): losses without a reward model.

pi is the policy that is trained, ref the model before training, y an answer to the prompt x:

    r(y) = log pi(y | x) - log ref(y | x)        summed over the answer's tokens

DPO, on pairs of a chosen answer w and a rejected answer l (arXiv:2305.18290, eq. 7):

    sigmoid        -log sigmoid(beta (r(w) - r(l)))
    ipo            (r(w)/|w| - r(l)/|l| - 1 / (2 beta))^2        arXiv:2310.12036, eq. 17, per token
    sigmoid_norm   -log sigmoid(beta (r(w)/|w| - r(l)/|l|))      length-normalised

KTO, on single answers with a thumb up or down (arXiv:2402.01306, eq. 7):

    up             1 - sigmoid(beta (r(y) - z))
    down           1 - sigmoid(beta (z - r(y)))
    z = max(0, mean of r(y') over the update)    y': the answer before it, to another prompt; estimates the KL

All are means over the pairs or answers of a whole update, as TRL computes them. References are computed once for
each item, alone, so that they do not depend on what else is in an update, and a resumed run finds the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TrainingError
from ..lora.files import read_adapter
from ..lora.trainable import LoraArgs, adapt, without_adapter
from .encoding import Encoded, Pair, Thumb
from .log_probs import ModelPolicy, Policy, backward, consecutive, document_sums, log_probs
from .packing import PackedRows, best_fit
from .supervised import Packed, pack

if TYPE_CHECKING:
    from .finetuning import Setting

DpoLoss = Callable[[Tensor, Tensor, float], Tensor]

DPO_LOSSES: dict[str, DpoLoss] = {  # of the difference of sums, the difference of means, and beta
    "sigmoid": lambda sums, means, beta: -F.logsigmoid(beta * sums),
    "ipo": lambda sums, means, beta: (means - 1 / (2 * beta)).square(),
    "sigmoid_norm": lambda sums, means, beta: -F.logsigmoid(beta * means),
}


def dpo_losses(ratios: Tensor, lengths: Tensor, beta: float, kind: str) -> Tensor:
    """DPO's losses (P,) from r and answer lengths (P, 2) of chosen and rejected; `kind` of DPO_LOSSES."""
    means = ratios / lengths
    return DPO_LOSSES[kind](ratios[:, 0] - ratios[:, 1], means[:, 0] - means[:, 1], beta)


def kto_losses(ratios: Tensor, good: Tensor, shift: Tensor, beta: float) -> Tensor:
    """KTO's losses (N,) from r and thumbs (N,), and z."""
    sign = torch.where(good, 1.0, -1.0)
    return 1 - torch.sigmoid(beta * sign * (ratios - shift))


class References:
    """Log-probabilities under the reference, summed over each document; computed once for each item."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.kept: dict[int, Tensor] = {}  # by the item's position: (documents of the item,)

    def of(self, position: int, documents: Sequence[Encoded]) -> Tensor:
        """The sums of an item's documents."""
        if position not in self.kept:
            batch = pack(documents).to(self.policy.device)
            self.kept[position] = document_sums(log_probs(self.policy, batch), batch, len(documents))
        return self.kept[position]


class PairBatch(NamedTuple):
    """Pairs packed as documents, each chosen answer before its rejected one, of an update of `n` pairs."""

    packed: Packed
    reference: Tensor  # (P, 2)
    n: int


class Preferences:
    """What DPO and KTO share: an update takes `rows` packed rows of whole items, in `accumulate` parts."""

    def __init__(
        self, policy: Policy, reference: Policy, items: Sequence[Any], packed: PackedRows, rows: int,
        accumulate: int, beta: float,
    ) -> None:  # fmt: skip
        self.policy, self.items, self.packed = policy, items, packed
        self.rows, self.accumulate, self.beta = rows, accumulate, beta
        self.references = References(reference)

    def updates(self, epochs: int) -> int:
        return -(-self.packed.rows_of(epochs) // self.rows)

    def micro_batches(self, step: int) -> list[Any]:
        return self._batches(self.packed.parts(step, self.rows, self.accumulate))

    def backward(self, batch: Any) -> dict[str, float]:
        log: dict[str, float] = {}
        loss = backward(self.policy, batch.packed, lambda values: self._mean(batch, values, log))
        return {"loss": loss.item(), "tokens": len(batch.packed.tokens), **log}

    def _batches(self, parts: Sequence[Sequence[int]]) -> list[Any]:
        """The batches of an update of these items, which share its normalization."""
        raise NotImplementedError

    def _mean(self, batch: Any, values: Tensor, log: dict[str, float]) -> Tensor:
        """A batch's share of the mean loss, of the log-probabilities `values`; writes its shares into the log."""
        raise NotImplementedError


class DPO(Preferences):
    """Training on pairs."""

    def __init__(
        self, policy: Policy, reference: Policy, items: Sequence[Pair], packed: PackedRows, rows: int,
        accumulate: int = 1, beta: float = 0.1, loss: str = "sigmoid",
    ) -> None:  # fmt: skip
        """`loss` is a key of DPO_LOSSES."""
        super().__init__(policy, reference, items, packed, rows, accumulate, beta)
        self.loss = loss

    def _batches(self, parts: Sequence[Sequence[int]]) -> list[PairBatch]:
        n = sum(map(len, parts))
        out = []
        for part in parts:
            reference = torch.stack([self.references.of(i, self.items[i]) for i in part])
            packed = pack([document for i in part for document in self.items[i]])
            out.append(PairBatch(packed.to(self.policy.device), reference, n))
        return out

    def _mean(self, batch: PairBatch, values: Tensor, log: dict[str, float]) -> Tensor:
        documents = batch.reference.numel()
        ratios = document_sums(values, batch.packed, documents).view(-1, 2) - batch.reference
        lengths = document_sums(torch.ones_like(values), batch.packed, documents).view(-1, 2)
        chosen, rejected = (self.beta * ratios.detach()).unbind(1)
        log["reward_chosen"] = chosen.sum().item() / batch.n
        log["reward_rejected"] = rejected.sum().item() / batch.n
        log["accuracy"] = (chosen > rejected).sum().item() / batch.n
        return dpo_losses(ratios, lengths, self.beta, self.loss).sum() / batch.n

    def evaluate(self, items: Sequence[Pair]) -> dict[str, float]:
        """Mean loss, and the share of pairs whose chosen answer has the higher reward."""
        held_out = DPO(self.policy, self.references.policy, items, self.packed, 1, beta=self.beta, loss=self.loss)
        parts = best_fit(pair_lengths(items), capacity(pair_lengths(items), self.packed.seq_len))
        return _evaluated(self.policy, held_out._batches(parts), held_out._mean, ("accuracy",))


class ThumbBatch(NamedTuple):
    """Packed answers, of an update of `n` answers."""

    packed: Packed
    reference: Tensor  # (N,)
    good: Tensor  # (N,) bool
    shift: Tensor  # (), the z of the update
    n: int


class KTO(Preferences):
    """Training on single answers with a thumb."""

    def __init__(
        self, policy: Policy, reference: Policy, items: Sequence[Thumb], packed: PackedRows, rows: int,
        accumulate: int = 1, beta: float = 0.1, good_weight: float = 1.0, bad_weight: float = 1.0,
    ) -> None:  # fmt: skip
        """`good_weight` and `bad_weight` multiply the losses of good and bad answers."""
        super().__init__(policy, reference, items, packed, rows, accumulate, beta)
        self.weights = (good_weight, bad_weight)

    def _batches(self, parts: Sequence[Sequence[int]]) -> list[ThumbBatch]:
        answers = [self.items[i].answer for part in parts for i in part]
        if len(answers) < 2:
            raise TrainingError(
                "KTO compares each prompt with another one's answer, and this update has a single answer",
                field="rows",
                hint="raise rows or seq_len; 16 answers and more give a good estimate of the KL",
            )
        shift, device = self._shift(answers), self.policy.device
        out = []
        for part in parts:
            items = [self.items[i] for i in part]
            reference = [self.references.of(i, [self.items[i].answer]) for i in part]
            packed = pack([item.answer for item in items]).to(device)
            good = torch.tensor([item.good for item in items], device=device)
            out.append(ThumbBatch(packed, torch.cat(reference), good, shift, len(answers)))
        return out

    def _shift(self, answers: Sequence[Encoded]) -> Tensor:
        """z: the mean of r over each prompt with the completion of the answer before it; 0 if negative."""
        mixed = [mismatched(answer, answers[i - 1]) for i, answer in enumerate(answers)]
        ratios = []
        for part in consecutive([len(m.ids) for m in mixed], self.packed.seq_len):
            batch = pack(mixed[part]).to(self.policy.device)
            difference = log_probs(self.policy, batch) - log_probs(self.references.policy, batch)
            ratios.append(document_sums(difference, batch, len(mixed[part])))
        return torch.cat(ratios).mean().clamp(min=0)

    def _mean(self, batch: ThumbBatch, values: Tensor, log: dict[str, float]) -> Tensor:
        good = batch.good
        ratios = document_sums(values, batch.packed, len(good)) - batch.reference
        rewards = self.beta * ratios.detach()
        log["reward_good"] = rewards[good].sum().item() / batch.n
        log["reward_bad"] = rewards[~good].sum().item() / batch.n
        log["kl"] = batch.shift.item() * len(good) / batch.n
        losses = torch.where(good, *self.weights) * kto_losses(ratios, good, batch.shift, self.beta)
        return losses.sum() / batch.n

    def evaluate(self, items: Sequence[Thumb]) -> dict[str, float]:
        """Mean loss and z over all items."""
        held_out = KTO(self.policy, self.references.policy, items, self.packed, 1, 1, self.beta, *self.weights)
        parts = best_fit(thumb_lengths(items), self.packed.seq_len)
        return _evaluated(self.policy, held_out._batches(parts), held_out._mean, ("kl",))


def _evaluated(
    policy: Policy, batches: Sequence[Any], mean: Callable[..., Tensor], measures: Sequence[str]
) -> dict[str, float]:
    """The sums of the batches' shares of the loss and of `measures`."""
    sums = dict.fromkeys(("loss", *measures), 0.0)
    for batch in batches:
        log: dict[str, float] = {}
        log["loss"] = mean(batch, log_probs(policy, batch.packed), log).item()
        sums = {name: value + log[name] for name, value in sums.items()}
    return {f"eval_{name}": value for name, value in sums.items()}


def pair_lengths(items: Sequence[Pair]) -> list[int]:
    """The places that each pair takes in a row."""
    return [len(pair.chosen.ids) + len(pair.rejected.ids) - 2 for pair in items]


def thumb_lengths(items: Sequence[Thumb]) -> list[int]:
    """The places that each answer takes in a row."""
    return [len(item.answer.ids) - 1 for item in items]


def capacity(lengths: Sequence[int], seq_len: int) -> int:
    """The tokens of a row of pairs: a pair of two documents of up to `seq_len` tokens fits in any case."""
    return max([seq_len, *lengths])


def mismatched(prompt_of: Encoded, completion_of: Encoded) -> Encoded:
    """The prompt of one answer with the completion of another; a completion begins at its first trained token."""
    cut, other = (int(np.argmax(d.trained)) for d in (prompt_of, completion_of))
    parts = ((own[:cut], others[other:]) for own, others in zip(prompt_of, completion_of, strict=True))
    return Encoded(*(np.concatenate(part) for part in parts))


def method_of(setting: Setting) -> DPO | KTO:
    """DPO on `Pair` items, or KTO on `Thumb` items, by the arguments.

    The reference is the model before training: the base, or the base with the adapter that training starts from.
    TrainingError if all thumbs point one way.
    """
    args, items = setting.args, setting.items
    before = without_adapter(setting.model)
    if args.start is not None:
        adapt(before, LoraArgs(), 0, read_adapter(args.start, before.args))
    policies = ModelPolicy(setting.model), ModelPolicy(before)
    beta = 0.1 if args.beta is None else args.beta
    if args.method == "dpo":
        lengths = pair_lengths(items)
        packed = PackedRows(lengths, capacity(lengths, args.seq_len), args.seed, setting.copies)
        kind = f"{args.loss}_norm" if args.length_normalized else args.loss
        return DPO(*policies, items, packed, args.rows, args.accumulate, beta, kind)
    if len({item.good for item in items}) < 2:
        raise TrainingError(
            f"all {len(items)} answers have the same thumb: KTO learns from good and bad ones", field="data"
        )
    packed = PackedRows(thumb_lengths(items), args.seq_len, args.seed, setting.copies)
    return KTO(*policies, items, packed, args.rows, args.accumulate, beta, args.good_weight, args.bad_weight)
