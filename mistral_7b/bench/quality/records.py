"""Quality records: one for each format, with the text and the circumstances of the run."""

from __future__ import annotations

import dataclasses
from typing import Any

PEER_TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_1", "Q4_0")  # llama.cpp's names
FLOAT32 = "F32"  # llama.cpp's unquantized file, which checks the method
EXACT = 1e-5  # the largest KL divergence of two correct float32 computations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circumstances:
    """Fields common to all records of a run.

    own_type     type of most of the model's own matrices, such as bfloat16, or Q4_1 of a GGUF file
    text_sha256  of the whole text in UTF-8, of which the first `rows` times `row_tokens` tokens are measured
    """

    model: str
    own_type: str
    text: str
    text_sha256: str
    rows: int
    row_tokens: int
    threads: int
    cpu: str
    date: str
    commit: str | None
    command: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityRecord(Circumstances):
    """The distance of one format from the model in float32, computed with quantized weights and activations.

    bits_per_weight  of the matrices of the layers and the output, scales and padding included; a tied embedding
                     counts as the output, otherwise the embedding is left out
    kl               mean KL(float32 || quantized), nats per token
    top1_agreement   fraction of predictions with the same most likely token
    tokens           number of predictions
    calibration      from the record of a quantized folder; None: rounded to nearest, or unknown (a GGUF file)
    file             name of a measured folder or file; None: quantized here
    path             instruction sets and kernels that ran
    """

    engine: str
    scheme: str
    what: str = "quality"
    bits_per_weight: float
    kl: float
    top1_agreement: float
    perplexity_original: float
    perplexity: float
    tokens: int
    calibration: dict[str, Any] | None = None
    file: str | None = None
    path: str
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """The format, for display: with the folder's or file's name if it was not quantized here."""
        calibrated = ", calibrated" if self.calibration else ""
        return f"{self.scheme}{calibrated}" + (f" ({self.file})" if self.file else "")
