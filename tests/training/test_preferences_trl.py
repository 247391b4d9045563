"""TRL computes the same log-probabilities, losses and gradients of DPO and KTO on the same tokens.

TRL pads a batch and runs transformers' model; here documents are packed. The tokenizer of TRL's trainer reads
"<5>" as token 5.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from preference_data import END, drawn, encoded
from test_transformers_parity import same_in_transformers
from tiny import tiny_args, tiny_model
from torch import Tensor

from mistral_7b.model import Mistral7B
from mistral_7b.training.encoding import Pair, Thumb
from mistral_7b.training.log_probs import ModelPolicy, document_sums, log_probs
from mistral_7b.training.packing import PackedRows
from mistral_7b.training.preferences import DPO, DPO_LOSSES, KTO
from mistral_7b.training.supervised import pack

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[dev]'")

BETA, N = 0.3, 5
ARGS = tiny_args(sliding_window=None)
PAIRS = drawn(N)
LABELS = [True, False, False, True, True]
WATCHED = "layers.0.attention.wv.weight"


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


def models() -> tuple[Mistral7B, Mistral7B]:
    """The policy, of which one weight is trained, and the base."""
    policy, base = tiny_model(ARGS, seed=0), tiny_model(ARGS, seed=0)
    noise = torch.Generator().manual_seed(1)
    for p in base.parameters():
        p += 0.1 * p.std() * torch.randn(p.shape, generator=noise)
    policy.get_parameter(WATCHED).requires_grad_(True)
    return policy, base


def text(ids: list[int]) -> str:
    return "".join(f" <{i}>" for i in ids)


def trainer(kind: Any, config: Any, rows: list[dict[str, Any]], folder: pathlib.Path, **options: Any) -> Any:
    """TRL's trainer of our models, over rows of text; TRL itself appends the end of each completion."""
    from datasets import Dataset
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(tokenizers.WordLevel({f"<{i}>": i for i in range(ARGS.vocab_size)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    policy, base = map(same_in_transformers, models())
    policy.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    return kind(
        policy, ref_model=base, train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"<{END}>", pad_token="<3>"),
        args=config(
            str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, beta=BETA,
            per_device_train_batch_size=N, disable_tqdm=True, **options,
        ),
    )  # fmt: skip


def gradient(loss: Tensor, theirs: Any) -> Tensor:
    weight = theirs.model.model.layers[0].self_attn.v_proj.weight
    return torch.autograd.grad(loss, weight)[0]


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = [{"prompt": text(p), "chosen": text(c[:-1]), "rejected": text(r[:-1])} for p, c, r in PAIRS]
    return trainer(trl.DPOTrainer, trl.DPOConfig, rows, tmp_path_factory.mktemp("dpo"))


def test_the_four_log_probabilities_of_dpo(dpo: Any) -> None:
    inputs = dpo.data_collator([dpo.train_dataset[i] for i in range(N)])
    packed = pack([encoded(p, answer) for p, *answers in PAIRS for answer in answers])
    for ours, theirs in zip(models(), (dpo.model, dpo.ref_model), strict=True):
        sums = document_sums(log_probs(ModelPolicy(ours), packed), packed, 2 * N).view(-1, 2)
        close(sums, torch.stack(dpo.compute_ref_log_probs(theirs, inputs), dim=1))


@pytest.mark.parametrize("kind", DPO_LOSSES)
def test_the_losses_of_dpo_and_their_gradients(dpo: Any, kind: str) -> None:
    dpo.loss_types = [kind]
    wanted = dpo._compute_loss(dpo.model, dpo.data_collator([dpo.train_dataset[i] for i in range(N)]), False)
    items = [Pair(encoded(p, chosen), encoded(p, rejected)) for p, chosen, rejected in PAIRS]
    policy, base = models()
    method = DPO(ModelPolicy(policy), ModelPolicy(base), items, PackedRows([1] * N, N, 0), 1, beta=BETA, loss=kind)
    logs = [method.backward(batch) for batch in method.micro_batches(0)]
    close(torch.tensor(sum(log["loss"] for log in logs)), wanted.detach())
    close(policy.get_parameter(WATCHED).grad, gradient(wanted, dpo))
    assert logs[0]["accuracy"] == pytest.approx(
        dpo._metrics["train" if dpo.model.training else "eval"]["rewards/accuracies"][-1]
    )


def test_the_loss_of_kto_and_its_gradient(tmp_path: pathlib.Path) -> None:
    rows = [
        {"prompt": text(p), "completion": text(answer[:-1]), "label": good}
        for (p, answer, _), good in zip(PAIRS, LABELS, strict=True)
    ]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    kto = trainer(trl.KTOTrainer, trl.KTOConfig, rows, tmp_path, **weights)
    wanted = kto._compute_loss(kto.model, kto.data_collator([kto.train_dataset[i] for i in range(N)]), False)
    items = [Thumb(encoded(p, answer), good) for (p, answer, _), good in zip(PAIRS, LABELS, strict=True)]
    policy, base = models()
    method = KTO(ModelPolicy(policy), ModelPolicy(base), items, InOrder(), 1, 1, BETA, *weights.values())
    logs = [method.backward(batch) for batch in method.micro_batches(0)]
    kl = kto._metrics["train" if kto.model.training else "eval"]["kl"][-1]
    assert kl > 0.1, "the term is tested with a KL that is not cut off at 0"
    close(torch.tensor(logs[0]["kl"]), torch.tensor(kl))
    close(torch.tensor(logs[0]["loss"]), wanted.detach())
    close(policy.get_parameter(WATCHED).grad, gradient(wanted, kto))


class InOrder(PackedRows):
    """All items in their order: the KL's pairs of a prompt and another one's answer depend on it."""

    def __init__(self) -> None:
        super().__init__([1] * N, N, 0)

    def row(self, number: int) -> list[int]:
        return list(range(N))
