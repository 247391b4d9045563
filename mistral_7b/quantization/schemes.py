"""Quantization schemes and their application to a model.

    int8    a float scale per output; half the bytes of bfloat16
    int4    groups of 128 or 32 inputs, with a zero point each (symmetric: all 8); the output projection and the
            embedding are int8
    bf16    not quantized: bfloat16 weights packed once for the CPU's matrix unit
    fp8     e4m3 with a float scale per output, on GPUs that support it; quantized when a model is loaded

With int8 and int4, a CPU quantizes activations to int8 per row; a GPU does not, and stores weights row-major
(gpu.py). With fp8, activations are quantized to e4m3. Norms keep the model's type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from ..kernels.backend import has_fp8, weight_layout
from ..kernels.cpu import huge_pages
from ..model import Mistral7B, ModelArgs
from ..surgery import replace_linears
from .fused import fuse
from .gpu import Fp8Linear, row_by_row
from .linear import Int4Linear, Int8Embedding, Int8Linear, PackedLinear
from .rounding import round_int4, round_int8

NAMES = ("int8", "int4", "bf16", "fp8")
GROUPS = (32, 128)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A quantization scheme. Raises QuantizationError for unknown names and group sizes."""

    name: str = "int4"
    group_size: int = 128  # of int4
    symmetric: bool = False  # of int4
    deterministic: bool = False  # of bf16: batch-invariant, but slower

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise QuantizationError(
                f"quantization {self.name!r} is not known: it must be one of {', '.join(NAMES)}",
                field="quantization",
            )
        if self.group_size not in GROUPS:
            raise QuantizationError(
                f"group_size must be {' or '.join(map(str, GROUPS))}, not {self.group_size}", field="group_size"
            )

    @classmethod
    def of(cls, scheme: str | Scheme) -> Scheme:
        """The scheme of a name; a scheme is returned unchanged."""
        return scheme if isinstance(scheme, Scheme) else cls(scheme)

    def __str__(self) -> str:
        if self.name != "int4":
            return self.name
        return f"int4 in groups of {self.group_size}, {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def whole(self) -> bool:
        """Whether weights are quantized to integers, which can be saved."""
        return self.name in ("int8", "int4")

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

    def linear(self, weight: Tensor, name: str, device: torch.device | str = "cpu") -> nn.Module:
        """The replacement of the Linear `name` (as "layers.0.attention.wq") with this weight (N, K).

        The weight is rounded on its own device, then packed for `device` and moved there. Raises QuantizationError
        if `device` does not support the scheme.
        """
        self.check_device(device)
        tiles = weight_layout(device) == "tiles"
        if self.name == "fp8":
            return Fp8Linear.from_weight(weight).to(device)
        if self.name == "bf16":
            return PackedLinear(weight.bfloat16(), self.deterministic) if tiles else _plain(weight, device)
        linear: Int8Linear | Int4Linear
        if self.name == "int8" or name == "output":
            linear = Int8Linear.from_codes(round_int8(weight))
        else:
            codes = round_int4(weight, self.group_size, self.symmetric)
            linear = Int4Linear.from_codes(codes, weight.shape[1])
        return linear if tiles else row_by_row(linear, device)

    def empty_linear(self, in_features: int, out_features: int, name: str) -> Int8Linear | Int4Linear:
        """The same module on the meta device, to be filled from a file."""
        if self.name == "int8" or name == "output":
            return Int8Linear(in_features, out_features, "meta")
        return Int4Linear(in_features, out_features, self.group_size, "meta")


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
        out = scheme.linear(linear.weight.detach(), name, linear.weight.device)
        if progress is not None:
            progress(name)
        return out

    replace_linears(model, build)
    if scheme.whole:
        model.set_submodule("tok_embeddings", Int8Embedding.from_weight(model.tok_embeddings.weight.detach()))
    fuse(model)
    return model


def empty_model(args: ModelArgs, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> Mistral7B:
    """A model of int8 or int4 modules on the meta device, to be filled from a file."""
    model = Mistral7B(args, dtype=dtype, device="meta")
    replace_linears(model, lambda old, name: scheme.empty_linear(old.in_features, old.out_features, name))  # type: ignore[arg-type]
    model.set_submodule("tok_embeddings", Int8Embedding(args.vocab_size, args.dim, dtype, "meta"))
    fuse(model)
    return model


def scheme_of(model: Mistral7B) -> Scheme | None:
    """The scheme of a model with exactly the tensors of `empty_model`; None for all other models.

    `symmetric` is determined from the zero points.
    """
    kinds = {type(m): m for m in model.modules()}
    int4 = kinds.get(Int4Linear)
    if isinstance(int4, Int4Linear):
        groups = (m.groups for m in model.modules() if isinstance(m, Int4Linear))
        symmetric = all(g.is_meta or bool((g >> 4 == 8).all()) for g in groups)
        scheme = Scheme("int4", int4.group_size, symmetric)
    elif Int8Linear in kinds:
        scheme = Scheme("int8")
    else:
        return None
    expected = {name: t.shape for name, t in empty_model(model.args, scheme).state_dict().items()}
    return scheme if {name: t.shape for name, t in model.state_dict().items()} == expected else None


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
            setattr(module, name, _random_buffer(name, value, block, scheme.symmetric))
        for name, value in list(module.named_parameters(recurse=False)):  # of norms
            setattr(module, name, nn.Parameter(torch.ones(value.shape, dtype=dtype), requires_grad=False))
    return model


def _random_buffer(name: str, like: Tensor, block: Tensor, symmetric: bool) -> Tensor:
    """Random codes; multipliers 3..6, zero points 7 or 8, and scales that keep activations near 1."""
    out = huge_pages.empty(like.shape, like.dtype)
    if name == "scale":
        return out.fill_(2e-4)
    flat = out.view(torch.uint8).view(-1)
    for part in flat.split(len(block)):
        part.copy_(block[: len(part)])
    if name == "groups":
        if symmetric:
            flat.bitwise_and_(3).add_(3 | 8 << 4)
        else:
            flat.bitwise_and_(1 << 4 | 3).add_(3 | 7 << 4)
    return out


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
            yield module.in_features * module.out_features * 2
