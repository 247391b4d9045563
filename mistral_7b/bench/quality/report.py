"""The table of quality records, in Markdown, and notes on how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..jobs import LLAMA
from ..report import table
from .records import EXACT, FLOAT32, PEER_TYPES, QualityRecord

if TYPE_CHECKING:
    from rich.table import Table


def heading(records: Sequence[QualityRecord]) -> str:
    """Return a heading: model, machine, text, versions."""
    r = records[0]
    versions = {name: v for r in records for name, v in r.versions.items()}
    return (
        f"{r.model}, {r.threads} threads of {r.cpu}, {r.date}, commit {r.commit or 'unknown'}\n"
        f"{r.text} (SHA-256 {r.text_sha256[:12]}), the first {r.rows} rows of {r.row_tokens} tokens\n"
        f"{', '.join(f'{name} {v}' for name, v in versions.items())}"
    )


def tables(records: Sequence[QualityRecord]) -> list[Table]:
    """Return the table: a row for each format, without the check of the method."""
    columns = ("bits per weight", "KL divergence", "perplexity", "top-1 agreement")
    out = table("distance from the model in float32", "engine", "weights", *columns)
    for r in records:
        if r.scheme != FLOAT32:
            change = r.perplexity / r.perplexity_original - 1
            cells = (f"{r.bits_per_weight:.2f}", f"{r.kl:.5f}", f"{change:+.2%}", f"{r.top1_agreement:.1%}")
            out.add_row(r.engine, r.name, *cells)
    return [out]


def notes(records: Sequence[QualityRecord]) -> list[str]:
    """Return what the table means, the check of the method, what is left out, and calibrations."""
    first = records[0]
    out = [
        "Bits per weight: the matrices of the layers and the output, with scales and padding; a tied embedding "
        "counts as the output, otherwise the embedding is left out.",
        f"Perplexity in float32: {first.perplexity_original:.3f}, over {first.tokens} predictions.",
    ]
    for r in records:
        if r.calibration:
            tokens, text = r.calibration.get("tokens"), r.calibration.get("text")
            out.append(f"{r.name}: {r.calibration.get('method')} on {tokens} tokens of {text}.")
    if check := check_of(records):
        out.append(f"llama.cpp's float32 logits against this package's: KL divergence {check.kl:.1e}.")
        if first.own_type in PEER_TYPES:
            out.append(f"llama.cpp's {first.own_type} is left out: the model's own weights lie on its grid.")
    return out + list(dict.fromkeys(f"{r.engine} ran on: {r.path}" for r in records))


def check_of(records: Sequence[QualityRecord]) -> QualityRecord | None:
    """Return the record of llama.cpp's unquantized file, if peers were measured."""
    return next((r for r in records if r.engine == LLAMA and r.scheme == FLOAT32), None)


def doubt(records: Sequence[QualityRecord]) -> str:
    """Return a warning if llama.cpp computes another function than this package, else ""."""
    check = check_of(records)
    if check is None or check.kl <= EXACT:
        return ""
    return f"llama.cpp's float32 logits differ by {check.kl:.1e} nats per token: its rows cannot be compared"
