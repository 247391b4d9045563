"""The commit that a record of a benchmark names."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_of(folder: Path | str = ".") -> str:
    """The commit that is checked out in a folder; "" if it is no checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True, capture_output=True, check=False
    )
    return done.stdout.strip()
