"""Counters of an engine, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counts:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0  # of prompts that have begun
    cached_tokens: int = 0  # of these, found in the prefix cache
    computed_tokens: int = 0  # fed to the model, with recomputed tokens and rejected drafts
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    disk_queries: int = 0  # prompt tokens that were not in memory, looked up in the prefix cache on disk
    disk_hits: int = 0  # of these, found
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    disk_dropped: int = 0  # pages that were not written because the disk was too slow
    finished: dict[str, int] = field(default_factory=dict)  # requests by finish reason, "abort" or "error"
    ended: int = 0  # requests, for any reason
