"""The arguments of a fine-tuning run. Imports no torch: the command line reads this file."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ..errors import TrainingError
from ..kernels import threads
from .args import RunArgs

MethodName = Literal["lora", "qlora", "full", "dpo", "kto", "grpo"]
PEAK = {"lora": 1e-4, "qlora": 1e-4, "full": 1e-5, "dpo": 2e-5, "kto": 2e-5, "grpo": 2e-5}
LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
SUPERVISED = ("lora", "qlora", "full")


@dataclasses.dataclass(frozen=True)
class FinetuneArgs(RunArgs):
    """Fine-tune a model on examples, or on preferences and rewards.

    Raises TrainingError, naming the field, for invalid values.
    """

    model: str = "demo"
    """The base model: a folder, a file, a hub id, "starter" or "demo"."""
    data: tuple[str, ...] = ()
    """Files of examples: FILE, or FILE:WEIGHT to take each of its rows WEIGHT times in an epoch."""
    out: str = "runs/finetune"
    """Output folder: the trained adapter or model, states to resume from, metrics and report."""
    method: MethodName = "lora"
    """lora: an adapter; qlora: an adapter of the quantized model; full: all weights. dpo, kto (preferences) and
    grpo (rewards) train an adapter."""
    quantization: Literal["int8", "q6_k", "q4_k_m", "int4", "bf16", "fp8"] | None = None
    """Quantize the base while it is loaded; None: int4 for qlora, else not."""

    chat_template: str | None = None
    """How conversations become text: a Jinja file, or a name like chatml or mistral-v3; None: the model's own."""

    rank: int = 16
    """Rank of the adapter's update of each Linear."""
    alpha: float = 32.0
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout of the adapter's inputs."""
    targets: tuple[str, ...] = LINEARS
    """The Linears of each block that are adapted; "output" is the projection onto the vocabulary."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    start: str | None = None
    """An adapter to train further; its ranks and scales apply."""

    lr: float | None = None
    """Peak learning rate; None: 1e-4 (lora, qlora), 1e-5 (full), 2e-5 (dpo, kto, grpo)."""
    epochs: int = 1
    """Passes over the data; `steps` overrides it."""
    steps: int | None = None
    """Number of updates; None: as many as the epochs take."""
    seq_len: int = 1024
    """Tokens per row at most; whole documents are packed into rows without attention across them."""
    rows: int = 8
    """Rows per update; grpo: prompts per update."""
    accumulate: int = 8
    """Parts into which an update is split to save memory; the gradients are the same."""
    warmup: int = 10
    """Updates of linear warmup before cosine decay; all, if a run has fewer."""
    final_lr: float = 0.1
    """Final learning rate, as a fraction of the peak."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    """Maximum gradient norm."""
    seed: int = 0
    """Determines the adapter's initial values, dropout and the order of the data."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base's weights and of activations; adapters and master weights are float32."""
    device: str = "cpu"
    threads: int | None = None
    """CPU threads, at most 4 per CPU; None: PyTorch's default, within the CPU quota."""
    compile: bool = False
    """torch.compile the feed-forward of each block: it pays on a GPU."""
    tensor_parallel: int = 1
    """full: processes of torchrun that compute every layer together; 1: they keep the weights in shards (FSDP).
    Adapters are trained by replicas of the base."""
    recompute: int | None = None
    """Blocks whose activations are computed again in the backward pass; None: as many as memory requires."""

    held_out: str | None = None
    """What is evaluated and not trained on: a file of examples, or a share of the data, such as 0.05."""
    eval_every: int = 0
    """Updates between evaluations; 0: only at the end."""
    patience: int = 0
    """Stop after so many evaluations without a lower loss, and keep the best; 0: never."""
    samples: int = 2
    """Held-out prompts that are answered before and after training, for the report."""
    save_every: int = 50
    """Updates between saved states; Ctrl-C and SIGTERM also save one."""
    keep: int = 1
    """Saved states that are kept."""
    log_every: int = 1
    skip_bad: bool = False
    """Leave out the lines of the data that cannot be used, instead of refusing all."""

    beta: float | None = None
    """dpo, kto: strength of the pull to the base (None: 0.1); grpo: weight of the KL from the base (None: 0)."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of dpo."""
    length_normalized: bool = False
    """dpo: use log-probabilities per token."""
    good_weight: float = 1.0
    """kto: factor of the losses of good answers, for data with many more of one kind."""
    bad_weight: float = 1.0
    """kto: factor of the losses of bad answers."""
    reward: str | None = None
    """grpo: a Python function that rates completions, as FILE.py:FUNCTION."""
    group: int = 8
    """grpo: completions sampled for each prompt."""
    max_tokens: int = 256
    """grpo: tokens of a completion at most; also of the samples of the report."""
    sample_every: int = 1
    """grpo: updates on the same completions; beyond the first, ratios are clipped."""
    ratio_clip: float = 0.2
    """grpo: a token whose ratio has moved by this much in its favoured direction has no gradient."""
    scale_rewards: bool = False
    """grpo: divide advantages by the deviation of their group."""

    FREE = (
        "steps", "epochs", "out", "held_out", "save_every", "eval_every", "log_every", "keep",
        "compile", "device", "threads", "accumulate", "recompute", "samples", "patience",
        "tensor_parallel",
    )  # fmt: skip

    def __post_init__(self) -> None:
        whole = ("rank", "epochs", "steps", "seq_len", "rows", "accumulate", "save_every", "keep", "log_every")
        self._check_at_least(1, *whole, "max_tokens", "sample_every", "tensor_parallel")
        self._check_at_least(2, "group")
        self._check_at_least(0, "eval_every", "patience", "samples", "recompute", "warmup", "seed")
        self._check_optimizer()
        self._check_rates("lr")
        self._check_positive("clip", "alpha", "beta", "ratio_clip", "good_weight", "bad_weight")
        self._check_rows(self.rows, self.accumulate)
        if not 0 <= self.dropout < 1:
            raise TrainingError(
                f"FinetuneArgs.dropout must be at least 0 and below 1, not {self.dropout}", field="dropout"
            )
        threads.check(self.threads)
        _ = self.held_out_share  # raises if it is none
        self._check_methods()

    def _check_optimizer(self) -> None:
        """Raise TrainingError for what AdamW or the schedule of its learning rate cannot take."""
        problems = {
            "final_lr": not 0 <= self.final_lr <= 1 and "in 0..1",
            "weight_decay": not 0 <= self.weight_decay < math.inf and "a finite number of at least 0",
            "betas": not all(0 <= beta < 1 for beta in self.betas) and "at least 0 and below 1",
        }
        for name, wanted in problems.items():
            if wanted:
                raise TrainingError(f"{self._of(name)} must be {wanted}, not {getattr(self, name)}", field=name)

    def _check_methods(self) -> None:
        """Options that the method does not have are refused, not ignored."""
        if not self.targets or (unknown := set(self.targets) - {*LINEARS, "output"}):
            named = ", ".join(sorted(unknown)) if self.targets else "none"
            raise TrainingError(
                f"FinetuneArgs.targets must be some of {', '.join(LINEARS)}, output; not {named}", field="targets"
            )
        if self.method == "full" and (self.quantization or self.start):
            raise TrainingError(
                "all weights of a quantized or adapted model cannot be trained",
                field="quantization" if self.quantization else "start",
                hint="use the method 'qlora'",
            )
        if self.method != "full" and self.tensor_parallel > 1:
            raise TrainingError(
                "an adapter is trained by replicas of its base",
                field="tensor_parallel",
                hint="leave it out: torchrun's processes then share the parts of every update",
            )
        if self.method == "grpo" and not self.reward:
            raise TrainingError("grpo needs a reward", field="reward", hint="name a function as FILE.py:FUNCTION")
        if self.method == "grpo" and self.dropout:
            raise TrainingError("grpo trains the policy that samples, which has no dropout", field="dropout")
        if self.patience and not (self.eval_every and self.held_out):
            raise TrainingError(
                "stopping early needs evaluations", field="patience", hint="set held_out and eval_every"
            )

    @property
    def held_out_share(self) -> float | None:
        """The share of the data that is held out; None if a file or nothing is."""
        try:
            share = float(self.held_out or "")
        except ValueError:
            return None
        if not 0 < share < 1:
            raise TrainingError(f"a share of the data must be above 0 and below 1, not {share}", field="held_out")
        return share

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return PEAK[self.method] if self.lr is None else self.lr

    @property
    def base_quantization(self) -> str | None:
        """The scheme by which the base is quantized while it is loaded."""
        return "int4" if self.method == "qlora" and self.quantization is None else self.quantization
