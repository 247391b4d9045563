"""Small models on disk, and the command in its own process."""

from __future__ import annotations

import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_7b import Mistral7B, ModelArgs

SHAPE = {
    "dim": 24,
    "n_layers": 2,
    "head_dim": 10,
    "hidden_dim": 40,
    "n_heads": 6,
    "n_kv_heads": 3,
    "vocab_size": 32768,
}


def write_model(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    torch.manual_seed(3)
    args = ModelArgs(**{**SHAPE, **changes})  # type: ignore[arg-type]
    Mistral7B(args, device="cpu").save_pretrained(folder)
    data = MistralTokenizer._data_path()
    shutil.copyfile(data / "mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model.v3")
    return folder


def interrupt(number: int) -> None:
    """Send this thread a signal, which is handled before the call returns.

    A signal to the process may be handled later, by whatever runs then. Where that is a callback of the garbage
    collector, such as hypothesis has, the exception is lost and the test waits for ever.
    """
    signal.pthread_kill(threading.get_ident(), number)


def start(*argv: str, before: str = "", **options: object) -> subprocess.Popen[bytes]:
    """Start the real command in its own process, where Ctrl-C and SIGHUP work as usual.

    `before` is Python code that runs first, to replace slow parts.
    """
    command = ["-c", f"{before}\nimport runpy; runpy.run_module('mistral_7b', run_name='__main__')"]

    def reset_signals() -> None:  # SIGHUP is ignored under nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *(command if before else ("-m", "mistral_7b")), *argv],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=reset_signals, **options,
    )  # fmt: skip
