"""Quantization schemes and their application to a model.

    int8      Q8_0: blocks of 32 inputs with a scale each; 8.5 bits a weight
    q6_k      Q6_K: 6.6 bits
    q4_k_m    Q4_K, and Q6_K for half of wv and w2, as llama.cpp mixes them; 4.8 bits
    int4      Q4_K: groups of 32 inputs with a scale and a minimum each; 4.5 bits
    bf16      not quantized: bfloat16 weights packed once for the CPU's matrix unit
    fp8       e4m3 with a float scale per output, on GPUs that support it; quantized when a model is loaded

All integer schemes are GGUF's block formats (kernels/cpu/formats.h). The output projection and the
embedding are Q8_0. A CPU quantizes activations to int8 in the same blocks; a GPU does not, and stores weights
row-major (gpu.py), Q4_K in 4.6 bits and Q6_K in 8.6. With fp8, activations are quantized to e4m3. Norms keep the
model's type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..kernels.backend import PACKED_LINEAR, Backend, has_fp8, uses, weight_layout
from ..kernels.cpu import huge_pages
from ..model import Mistral7B, ModelArgs
from ..surgery import replace_linears
from .fused import fuse
from .gpu import Fp8Linear, GpuBlockLinear, row_by_row, to_gpu
from .linear import BlockLinear, Int8Embedding, PackedLinear
from .rounding import round_blocks

KINDS = {"int8": "Q8_0", "q6_k": "Q6_K", "q4_k_m": "Q4_K", "int4": "Q4_K"}  # the format of most matrices
NAMES = (*KINDS, "bf16", "fp8")
OUTPUT_KIND = "Q8_0"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A quantization scheme. Raises QuantizationError for unknown names."""

    name: str = "int4"
    deterministic: bool = False  # of bf16: batch-invariant, but slower

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise QuantizationError(
                f"quantization {self.name!r} is not known: it must be one of {', '.join(NAMES)}",
                field="quantization",
            )

    @classmethod
    def of(cls, scheme: str | Scheme) -> Scheme:
        """The scheme of a name; a scheme is returned unchanged."""
        return scheme if isinstance(scheme, Scheme) else cls(scheme)

    def __str__(self) -> str:
        return self.name

    @property
    def whole(self) -> bool:
        """Whether weights are quantized to integers, which can be saved."""
        return self.name in KINDS

    def kind(self, name: str, n_layers: int) -> str:
        """The block format of the Linear `name` (as "layers.0.attention.wq") of a model with `n_layers` layers."""
        if name == "output":
            return OUTPUT_KIND
        return "Q6_K" if self.name == "q4_k_m" and is_promoted(name, n_layers) else KINDS[self.name]

    def check_device(self, device: torch.device | str) -> None:
        """Raise QuantizationError if a device does not support this scheme."""
        device = torch.device(device)
        if weight_layout(device) is None:
            raise QuantizationError(
                f"quantized models run on a CPU or an NVIDIA GPU, not on {device}",
                field="device",
                hint="use the device 'cpu', or a model that is not quantized",
            )
        if self.name == "fp8" and not has_fp8(device):
            raise QuantizationError(
                f"fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), which {device} is not",
                field="quantization",
                hint="use int8, whose weights have the same size",
            )

    def linear(
        self,
        weight: Tensor,
        name: str,
        n_layers: int,
        device: torch.device | str = "cpu",
    ) -> nn.Module:
        """The replacement of the Linear `name` (as "layers.0.attention.wq") with this weight (N, K).

        The weight is rounded on its own device, then packed for `device` and moved there. Raises
        QuantizationError if `device` does not support the scheme.
        """
        self.check_device(device)
        tiles = weight_layout(device) == "tiles"
        if self.name == "fp8":
            return Fp8Linear.from_weight(weight).to(device)
        if self.name == "bf16":
            # float32 only by the deterministic engine, which keeps the model's type
            keeps = self.deterministic and uses(Backend.ONEDNN, PACKED_LINEAR, weight)
            weight = weight if keeps else weight.bfloat16()
            return PackedLinear(weight, self.deterministic) if tiles else _plain(weight, device)
        kind = self.kind(name, n_layers)
        linear = BlockLinear.of_blocks(kind, round_blocks(weight, kind), weight.shape[1])
        return linear if tiles else row_by_row(linear, device)


def is_promoted(name: str, n_layers: int) -> bool:
    """Whether llama.cpp's Q4_K_M keeps a matrix in Q6_K: wv and w2 of the outer eighths and each third layer."""
    parts = name.split(".")
    if parts[-1] not in ("wv", "w2"):
        return False
    layer, eighth = int(parts[1]), n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _plain(weight: Tensor, device: torch.device | str) -> nn.Linear:
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16, device="meta")
    out.load_state_dict({"weight": weight.to(device, torch.bfloat16)}, assign=True)
    return out


def quantize(model: Mistral7B, scheme: str | Scheme, progress: Callable[[str], None] | None = None) -> Mistral7B:
    """Quantize a model in place, one Linear at a time, freeing each before the next; returns the model.

    Raises QuantizationError and leaves the model unchanged if its device does not support the scheme.
    """
    scheme = Scheme.of(scheme)
    scheme.check_device(model.norm.weight.device)

    def build(linear: nn.Module, name: str) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        out = scheme.linear(linear.weight.detach(), name, model.args.n_layers, linear.weight.device)
        if progress is not None:
            progress(name)
        return out

    replace_linears(model, build)
    if scheme.whole:
        model.set_submodule("tok_embeddings", Int8Embedding.from_weight(model.tok_embeddings.weight.detach()))
    fuse(model)
    return model


def empty_model(args: ModelArgs, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> Mistral7B:
    """A model of quantized modules on the meta device, to be filled from a file."""
    model = Mistral7B(args, dtype=dtype, device="meta")

    def build(linear: nn.Module, name: str) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        return BlockLinear(scheme.kind(name, args.n_layers), linear.in_features, linear.out_features, "meta")

    replace_linears(model, build)
    model.set_submodule("tok_embeddings", Int8Embedding(args.vocab_size, args.dim, dtype, "meta"))
    fuse(model)
    return model


def scheme_of(model: Mistral7B) -> Scheme | None:
    """The scheme of a model with exactly the tensors of `empty_model`, tiled or on a GPU; None for all others."""
    quantized = (BlockLinear, GpuBlockLinear)
    kinds = {name: module.kind for name, module in model.named_modules() if isinstance(module, quantized)}
    for name in KINDS:
        scheme = Scheme(name)
        if kinds and all(scheme.kind(linear, model.args.n_layers) == kind for linear, kind in kinds.items()):
            expected = empty_model(model.args, scheme)
            if any(isinstance(module, GpuBlockLinear) for module in model.modules()):
                to_gpu(expected, "meta")
            return scheme if _shapes(model) == _shapes(expected) else None
    return None


def _shapes(model: Mistral7B) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def random_model(args: ModelArgs, scheme: str | Scheme | None, dtype: torch.dtype = torch.bfloat16) -> Mistral7B:
    """A model with random quantized weights, created in seconds, for measuring speed and memory at full size."""
    if scheme is None:
        return Mistral7B(args, dtype=dtype).requires_grad_(False)
    scheme = Scheme.of(scheme)
    scheme.check_device("cpu")
    if not scheme.whole:
        return quantize(Mistral7B(args, dtype=torch.bfloat16).requires_grad_(False), scheme)
    model = empty_model(args, scheme, dtype)
    generator = torch.Generator().manual_seed(0)
    # One block of random codes is repeated, which is faster than drawing all.
    block = torch.randint(0, 256, (2**22,), dtype=torch.uint8, generator=generator)
    for module in model.modules():
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, _random_buffer(name, value, block))
        if isinstance(module, BlockLinear):
            _fill_scales(module)
        for name, value in list(module.named_parameters(recurse=False)):  # of norms
            setattr(module, name, nn.Parameter(torch.ones(value.shape, dtype=dtype), requires_grad=False))
    return model


def _random_buffer(name: str, like: Tensor, block: Tensor) -> Tensor:
    """Random codes; scales of the embedding that keep activations near 1."""
    out = huge_pages.empty(like.shape, like.dtype)
    if name == "scale":
        return out.fill_(2e-4)
    flat = out.view(torch.uint8).view(-1)
    for part in flat.split(len(block)):
        part.copy_(block[: len(part)])
    return out


def _fill_scales(linear: BlockLinear) -> None:
    """Scales that give random codes a mean near zero and a standard deviation near 0.015."""
    if linear.kind == "Q4_K":  # means: s 31.5, t 31.5, q 7.5
        linear.d[:, :, 0], linear.d[:, :, 1] = 7e-5, 7.5 * 7e-5
    else:
        linear.d.fill_({"Q8_0": 2e-4, "Q6_K": 1.1e-5}[linear.kind])


def compressed_bytes(model: Mistral7B) -> int:
    """Bytes of weights read by a decode step: all but the embedding."""
    return sum(_bytes(model, "tok_embeddings"))


def _bytes(model: nn.Module, without: str) -> Iterator[int]:
    for name, module in model.named_modules():
        if name.split(".")[0] == without:
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        yield sum(t.numel() * t.element_size() for t in tensors)
        if isinstance(module, PackedLinear):
            yield module.in_features * module.out_features * module.dtype.itemsize
