"""The kernels for 64-bit ARM, in an emulator: bit-identical to the scalar kernels in their tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

HERE = Path(__file__).parent
PRODUCTS = [HERE / "test_linear.py"]
OTHERS = [HERE / f"test_{name}.py" for name in ("elementwise", "attend_packed", "low_rank")]
MODELS = [HERE.parent / "quantization" / "test_fused_pages.py"]
SKIPPED = "4096 or torch_compile or instruction_set"  # slow, and the same code as others


@pytest.mark.slow
@pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())
@pytest.mark.parametrize(
    ("instructions", "files"),
    [("dotprod", [*PRODUCTS, *OTHERS, *MODELS]), ("i8mm", PRODUCTS)],  # which differ in products only
)
def test_the_kernels_for_arm_are_bit_identical(instructions: str, files: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "emulated.py", instructions, "-x", "-k", f"not ({SKIPPED})", *files],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    calls, _, running = done.stdout.splitlines()[-1].partition(" calls on ")
    assert running == f"NEON {instructions}"
    assert int(calls) > 1000
