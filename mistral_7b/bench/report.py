"""Tables of records: results relative to ceilings, and ratios to each peer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .jobs import OURS
from .records import Record

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "decode": "decode, 1 row after {context} tokens",
    "prefill": "prefill of {context} tokens",
    "batch16": "{rows} rows decoding together after {context} tokens each",
    "load": "load, to the first token (file in the page cache)",
}

QUIET = 0.2  # spread of the seconds; below 0.1 on an idle machine


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The speed of one of our schemes relative to each peer."""

    what: str
    scheme: str
    times: dict[str, float]  # "llama.cpp Q4_0" -> our tokens per second / the peer's

    @property
    def best_peer(self) -> str:
        return min(self.times, key=lambda name: self.times[name])


def ratios(records: list[Record]) -> list[Ratio]:
    """Compare each of our records with every peer record of the same workload."""
    out = []
    for ours in (r for r in records if r.engine == OURS):
        peers = [r for r in records if r.engine != OURS and r.what == ours.what]
        if peers:
            times = {f"{p.engine} {p.scheme}": ours.tokens_per_s / p.tokens_per_s for p in peers}
            out.append(Ratio(ours.what, ours.scheme, times))
    return out


def heading(records: list[Record]) -> str:
    """Return a heading: model, machine, ceilings, versions."""
    r = records[0]
    peaks = {r.matrix_peak: None for r in records}
    products = " and ".join(f"{p / 1e12:.2f}" for p in sorted(peaks, reverse=True))
    versions = {name: v for r in records for name, v in r.versions.items()}
    return (
        f"{r.model}, {r.threads} threads of {r.cpu}, {r.date}, commit {r.commit or 'unknown'}\n"
        f"ceilings: memory bandwidth {r.read_bandwidth / 1e9:.1f} GB/s, matrix products {products} Top/s\n"
        f"{', '.join(f'{name} {v}' for name, v in versions.items())}"
    )


def tables(records: list[Record]) -> list[Table]:
    """Return one table per workload, and of ratios if there are peers, in Markdown style."""
    kinds = list(dict.fromkeys(r.what for r in records))
    out = [figures(what, [r for r in records if r.what == what]) for what in kinds]
    compared = ratios(records)
    return [*out, ratio_table(compared)] if compared else out


def figures(what: str, records: list[Record]) -> Table:
    """Return the table of one workload."""
    title = TITLES[what].format(context=records[0].context, rows=records[0].rows)
    rate = "seconds" if what == "load" else "tok/s"
    out = table(title, "engine", "scheme", rate, "spread", "GB/s", "Top/s", "of ceiling", "peak memory")
    for r in records:
        out.add_row(
            r.engine, r.scheme, _digits(r.seconds if what == "load" else r.tokens_per_s), f"{r.spread:.1%}",
            f"{r.bytes_per_s / 1e9:.1f}", f"{r.operations_per_s / 1e12:.3f}", f"{r.ceiling_fraction:.1%}",
            f"{r.peak_rss_bytes / 1e9:.2f} GB",
        )  # fmt: skip
    return out


def ratio_table(compared: list[Ratio]) -> Table:
    """Return the table of ratios: a row per record of ours, a column per peer."""
    peers = list(dict.fromkeys(name for r in compared for name in r.times))
    out = table("ours over each peer (*: the fastest peer)", "work", "scheme", *peers)
    for r in compared:
        cells = [f"{r.times[p]:.2f}{'*' if p == r.best_peer else ' '}" if p in r.times else "" for p in peers]
        out.add_row(r.what, r.scheme, *cells)
    return out


def doubt(records: list[Record]) -> str:
    """Return a warning if times vary too much to be quoted, else ""."""
    wide = [f"{r.what} {r.engine} {r.scheme}" for r in records if r.spread > QUIET]
    if not wide:
        return ""
    return f"spread above {QUIET:.0%}: the machine was busy, so do not quote these results: {', '.join(wide)}"


def notes(records: list[Record]) -> list[str]:
    """Return the kernels that ran, a line for each engine and scheme."""
    paths = {f"{r.engine} {r.scheme}": r.path for r in records}
    return [f"{name} ran on: {path}" for name, path in paths.items()]


def table(title: str, *columns: str) -> Table:
    """Return an empty table in Markdown style with the first two columns left-aligned."""
    from rich import box
    from rich.table import Table

    out = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for n, column in enumerate(columns):
        out.add_column(column, justify="left" if n < 2 else "right", no_wrap=True)
    return out


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
