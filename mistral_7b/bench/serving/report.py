"""Tables of serving records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..jobs import OURS
from ..report import QUIET, table
from .records import ServingRecord, Times

if TYPE_CHECKING:
    from rich.table import Table


def heading(records: Sequence[ServingRecord]) -> str:
    """Return a heading: model, machine, traffic, versions."""
    r = records[0]
    shared = f", {r.shared:.0%} of each prompt shared" if r.shared else ""
    versions = {name: v for r in records for name, v in r.versions.items()}
    return (
        f"{r.model}, {r.threads} threads of {r.cpu}, {r.date}, commit {r.commit or 'unknown'}\n"
        f"prompts of {_span(r.prompt)} tokens{shared}, completions of {_span(r.output)}, "
        f"at most {r.max_sequences} concurrent sequences, seed {r.seed}\n"
        f"{', '.join(f'{name} {v}' for name, v in versions.items())}"
    )


def tables(records: Sequence[ServingRecord]) -> list[Table]:
    """Return the tables of throughput and times, and of ratios if there is a peer."""
    compared = ratios(records)
    out = [throughput(records), times(records)]
    return [*out, ratio_table(compared)] if compared else out


def throughput(records: Sequence[ServingRecord]) -> Table:
    columns = ("requests/s", "output tok/s", "total tok/s", "spread", "queue", "cached", "failed", "peak memory")
    out = table("serving: throughput", "engine", "scheme", "arrivals", *columns)
    for r in records:
        out.add_row(
            r.engine, r.scheme, r.name, f"{r.requests_per_s:.3g}", _digits(r.tokens_per_s),
            _digits(r.total_tokens_per_s), f"{r.spread:.1%}" if r.rounds > 1 else "", queue(r),
            str(r.cached_tokens), str(r.failed), f"{r.peak_rss_bytes / 1e9:.2f} GB",
        )  # fmt: skip
    return out


def times(records: Sequence[ServingRecord]) -> Table:
    columns = ("first token, s", "between tokens, ms", "whole request, s")
    out = table("serving: latency, p50 / p95 / p99", "engine", "scheme", "arrivals", *columns)
    for r in records:
        cells = (_times(r.first_token), _times(r.between_tokens, 1000), _times(r.latency))
        out.add_row(r.engine, r.scheme, r.name, *cells)
    return out


def queue(r: ServingRecord) -> str:
    """Return whether the engine kept up with its arrivals."""
    if r.rate is None:
        return ""
    if r.kept_up is None:
        return "too short to tell"
    return "kept up" if r.kept_up else f"grew to {r.unfinished}"


def ratios(records: Sequence[ServingRecord]) -> list[tuple[ServingRecord, ServingRecord]]:
    """Pair each of our records with the peer records of the same traffic."""
    out = []
    for ours in (r for r in records if r.engine == OURS):
        same = (ours.rate, ours.requests)
        out += [(ours, r) for r in records if r.engine != OURS and (r.rate, r.requests) == same]
    return out


def ratio_table(compared: Sequence[tuple[ServingRecord, ServingRecord]]) -> Table:
    """Return the table of our throughput and times divided by the peer's."""
    columns = ("output tok/s", "first token p50", "between tokens p50", "whole request p50")
    out = table(
        "ours over the peer's (throughput: higher is better, latency: lower)", "ours", "peer", "arrivals", *columns
    )
    for ours, peer in compared:
        pairs = ((getattr(ours, name)["p50"], getattr(peer, name)["p50"]) for name in TIMES)
        shares = [f"{a / b:.2f}" if b else "" for a, b in pairs]
        rate = f"{ours.tokens_per_s / peer.tokens_per_s:.2f}"
        out.add_row(ours.scheme, f"{peer.engine} {peer.scheme}", ours.name, rate, *shares)
    return out


TIMES = ("first_token", "between_tokens", "latency")


def doubt(records: Sequence[ServingRecord]) -> str:
    """Return warnings about failures and varying times, else ""."""
    warnings = []
    if failed := sum(r.failed for r in records):
        warnings.append(f"{failed} requests failed; throughput and latency exclude them")
    if wide := [f"{r.engine} {r.scheme} {r.name}" for r in records if r.spread > QUIET]:
        warnings.append(f"spread above {QUIET:.0%}, so the machine was busy: {', '.join(wide)}")
    return "\n".join(warnings)


def _span(span: tuple[int, int]) -> str:
    low, high = span
    return str(low) if low == high else f"{low} to {high}"


def _times(found: Times, scale: int = 1) -> str:
    return " / ".join(f"{scale * s:.3g}" if scale * s < 1000 else f"{scale * s:.0f}" for s in found.values())


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def notes(records: Sequence[ServingRecord]) -> list[str]:
    """Return the kernels that ran, a line for each engine and scheme."""
    paths = {f"{r.engine} {r.scheme}": r.path for r in records}
    return [f"{name} ran on: {path}" for name, path in paths.items()]
