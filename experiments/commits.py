"""The commit for the record of a measurement."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_of(folder: Path | str = ".") -> str:
    """Return the commit checked out in a folder; "" outside a checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True, capture_output=True, check=False
    )
    return done.stdout.strip()
