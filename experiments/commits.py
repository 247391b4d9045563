"""What a record of a measurement says of its origin."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mistral_7b.machine import cpu_name


def commit_of(folder: Path | str = ".") -> str:
    """Return the commit checked out in a folder; "" outside a checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True, capture_output=True, check=False
    )
    return done.stdout.strip()


def finish(record: dict[str, Any], json_file: Path | None) -> None:
    """Print a record with date, commit, command and CPU, and write it to a file if there is one."""
    text = json.dumps(
        {**record, "cpu": cpu_name(), "date": datetime.date.today().isoformat(),
         "commit": commit_of(), "command": "python " + " ".join(sys.argv)},
        indent=1,
    )  # fmt: skip
    print(text)
    if json_file is not None:
        json_file.write_text(text + "\n")
