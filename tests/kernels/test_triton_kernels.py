"""All Triton kernels against their twins: in the interpreter, compiled for GPUs, and on a GPU if present.

Each in a process of its own, because Triton reads TRITON_INTERPRET when it is first imported, which another
test may have done.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WITHOUT = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: pip install --no-deps triton==3.6.0 runs these without a GPU",
)
CHECKS = ("check_linear.py", "check_fused.py", "check_paged.py")


def run(check: str, interpret: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / check)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@WITHOUT
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(check: str) -> None:
    run(check, interpret=True)


@WITHOUT
@pytest.mark.slow
def test_compile_for_other_gpus() -> None:
    run("check_compiled.py", interpret=False)


@WITHOUT
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the kernels run in the interpreter only"
)
@pytest.mark.parametrize("check", CHECKS)
def test_on_the_gpu(check: str) -> None:
    run(check, interpret=False)
