"""transformers in its fastest CPU setup: eager, bfloat16, scaled_dot_product_attention."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers
from torch import Tensor

from ...kernels import threads
from ..jobs import Job

PATTERN = 1 << 22  # random numbers repeated in all weights: sampling 7 billion would take too long


class Engine:
    def __init__(self, job: Job) -> None:
        threads.use(job.threads)
        self.model = build(job.args)
        table = self.model.get_input_embeddings().weight
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters()) - table.nbytes
        if job.args["tie_embeddings"]:
            self.weight_bytes += table.nbytes
        a = job.args
        self.kv_token_bytes = 2 * a["n_layers"] * a["n_kv_heads"] * a["head_dim"] * 2
        self.tokens = torch.randint(0, a["vocab_size"], (job.rows, job.prompt))
        self.threads = torch.get_num_threads()
        self.path = f"PyTorch operators ({torch.backends.cpu.get_cpu_capability()}), eager, sdpa"
        self.versions = {
            "transformers": transformers.__version__, "torch": torch.__version__,
            "python": platform.python_version(),
        }  # fmt: skip

    def begin(self) -> None:
        self.cache = transformers.DynamicCache(config=self.model.config)
        self._forward(self.tokens)

    def step(self) -> None:
        self._forward(self.logits.argmax(-1))

    @torch.inference_mode()
    def _forward(self, tokens: Tensor) -> None:
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits = out.logits  # (B, 1, V)


def build(args: dict[str, Any]) -> Any:
    """Build MistralForCausalLM of this shape with random weights in memory, in seconds."""
    config = transformers.MistralConfig(
        hidden_size=args["dim"], intermediate_size=args["hidden_dim"], num_hidden_layers=args["n_layers"],
        num_attention_heads=args["n_heads"], num_key_value_heads=args["n_kv_heads"], head_dim=args["head_dim"],
        vocab_size=args["vocab_size"], rms_norm_eps=args["norm_eps"], sliding_window=args["sliding_window"],
        rope_parameters={"rope_type": "default", "rope_theta": args["rope_theta"]},
        tie_word_embeddings=args["tie_embeddings"],
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies were on meta, too
    pattern = torch.empty(PATTERN, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.fill_(1)
            else:
                for piece in p.view(-1).split(PATTERN):
                    piece.copy_(pattern[: piece.numel()])
    return model
