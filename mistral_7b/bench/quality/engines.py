"""What other engines compute for a model's files, as `mistral-7b compare` needs it.

R rows · T tokens · V vocabulary
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ... import machine
from ...checkpoint import convert, read_record
from ...checkpoint.gguf.file import is_gguf
from ...checkpoint.reading import CONFIGS
from ...errors import BenchmarkError, first_line
from ...evaluation.comparison.engine import Ran
from ..jobs import LLAMA
from ..run import SPARE, call, need


def ran(engine: str, path: pathlib.Path, tokens: Tensor, python: str) -> Ran:
    """Run "transformers" or "llama.cpp" over tokens (R, T), each row on its own.

    Only transformers gives hidden states. llama.cpp runs under the Python `python`. Files of other formats are
    converted for the engine in a temporary folder, dequantized. Raises BenchmarkError if the engine is missing or
    cannot open the files.
    """
    return Ran(_llama(path, tokens, python)) if engine == LLAMA else _transformers(path, tokens)


def _llama(path: pathlib.Path, tokens: Tensor, python: str) -> Tensor:
    need(python, "llama_cpp")
    with tempfile.TemporaryDirectory(prefix="mistral-7b-compare-") as place:
        folder = pathlib.Path(place)
        source = path
        if not (path.is_file() and is_gguf(path)):
            source = folder / "model.gguf"
            convert(path, source, "gguf")
        np.save(folder / "tokens.npy", tokens.to(torch.int32).numpy())
        job = {
            "kind": None, "source": str(source), "file": "", "tokens": str(folder / "tokens.npy"),
            "logits": str(folder / "logits"), "threads": torch.get_num_threads(),
        }  # fmt: skip
        call(python, "quality", json.dumps(job))
        return torch.from_numpy(np.fromfile(folder / "logits", np.float32)).view(*tokens.shape, -1)


@torch.inference_mode()
def _transformers(path: pathlib.Path, tokens: Tensor) -> Ran:
    if importlib.util.find_spec("transformers") is None:
        raise BenchmarkError("transformers is not installed", hint="pip install transformers")
    with tempfile.TemporaryDirectory(prefix="mistral-7b-compare-") as place:
        if read_record(path) is not None:
            raise BenchmarkError(
                "transformers cannot open a folder of `mistral-7b quantize`",
                place=path,
                hint="name the model that it was made from, or compare the folder with that model here",
            )
        if not (path.is_dir() and (path / CONFIGS["huggingface"]).is_file()):
            convert(path, pathlib.Path(place) / "model", "huggingface")  # GGUF, or Mistral's format
            path = pathlib.Path(place) / "model"
        return _states(path, tokens)


def _states(path: pathlib.Path, tokens: Tensor) -> Ran:
    """Logits and hidden states of transformers for a folder of its own format."""
    import transformers

    size, free = 2 * sum(f.stat().st_size for f in path.glob("*.safetensors")) + SPARE, machine.memory()[1]
    if free and size > free:
        raise BenchmarkError(
            f"transformers needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free", place=path
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BenchmarkError(f"transformers cannot open it: {first_line(error)}", place=path) from error
    states: list[list[Tensor]] = [[] for _ in range(1 + 2 * len(model.model.layers))]

    def keep(n: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: states[n].append(inputs[0])

    for n, layer in enumerate(model.model.layers):  # the input of each half, and of the last norm
        layer.register_forward_pre_hook(keep(2 * n))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(2 * n + 1))
    model.model.norm.register_forward_pre_hook(keep(len(states) - 1))
    logits = torch.cat([model(row[None], use_cache=False).logits.float() for row in tokens])
    return Ran(logits, [torch.cat(rows) for rows in states])
