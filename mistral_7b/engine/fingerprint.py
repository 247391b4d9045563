"""Hashes of everything except the tokens that determines keys and values: equal hashes mean equal results.

All weights are read once, at the speed of memory: files' names and dates would tell nothing of a model that was
quantized, merged or trained after it was opened, and samples would miss a change of a few rows. A tensor's digest
is the SHA-256 of sums of its bytes, taken as whole numbers of 64 bits along rows and along columns. It tells apart
weights that differ by accident, not ones made to deceive.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from operator import itemgetter

import torch
from torch import Tensor, nn

from .. import __version__
from ..kernels.cpu import compiler
from ..lora.adapters import Adapters
from ..model import Mistral7B
from .config import EngineConfig
from .pages import PagePool

FORMAT = 1  # raised when the same engine would compute or store other bytes
WIDTH = 512  # whole numbers to a row
CHUNK = 2**17  # rows that are summed at a time: 512 MiB


def space_of(model: Mistral7B, pool: PagePool, config: EngineConfig) -> str:
    """The hash of everything besides tokens and adapter that determines keys and values: 64 hex digits."""
    library = compiler.library()
    facts: list[object] = [
        FORMAT, __version__, torch.__version__, torch.version.cuda, compiler.cpu(),
        torch.backends.cpu.get_cpu_capability(), library and library._name.rpartition("/")[2],
        sorted(dataclasses.asdict(model.args).items()), _device(pool.layers[0][0].device), pool.page,
        str(pool.dtype), pool.int8, config.deterministic, weights_of(model),
    ]  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def adapter_of(adapters: Adapters, name: str | None) -> str:
    """The digest of an adapter's weights; "" for the model alone. AdapterError for one that is not loaded."""
    if name is None:
        return ""
    found = hashlib.sha256()
    for target, low in sorted(adapters.factors(name).items()):
        found.update(f"{target} {digest(low.a)} {digest(low.b)}\n".encode())
    return found.hexdigest()


def weights_of(model: nn.Module) -> str:
    """The digest of a model's modules and all their tensors."""
    found, known = hashlib.sha256(), dict[int, str]()
    for name, module in model.named_modules():
        kind = (name, type(module).__qualname__, module.extra_repr(), getattr(module, "deterministic", None))
        found.update(repr(kind).encode())
        for key, t in sorted(_tensors(module), key=itemgetter(0)):
            if id(t) not in known:  # tied weights are read once
                known[id(t)] = digest(t)
            found.update(f"{key} {known[id(t)]}\n".encode())
    return found.hexdigest()


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """A module's own parameters, buffers and attributes that are tensors."""
    for named in (module._parameters, module._buffers, vars(module)):
        yield from ((key, t) for key, t in named.items() if isinstance(t, Tensor))


@torch.inference_mode()
def digest(t: Tensor) -> str:
    """A digest of a tensor's type, shape and bytes, on any device."""
    found = hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode())
    t = t.to_dense() if t.is_mkldnn else t
    flat = t.contiguous().reshape(-1).view(torch.uint8)
    whole = len(flat) // (8 * WIDTH) * 8 * WIDTH
    found.update(flat[whole:].cpu().numpy().tobytes())
    for part in flat[:whole].view(-1, 8 * WIDTH).split(CHUNK):
        part = part if part.storage_offset() % 8 == 0 else part.clone()
        numbers = part.view(torch.int64)  # (rows, WIDTH)
        for sums in (numbers.sum(0), numbers.sum(1)):
            found.update(sums.cpu().numpy().tobytes())
    return found.hexdigest()


def _device(device: torch.device) -> str:
    """A device, as far as results depend on it."""
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
