"""Tensor parallel: each of K ranks computes some heads and outputs of every layer, beside an unchanged model.

    weights               wq wk wv        attention    wo            w1 w3      w2            output
    float       splits    heads           heads        inputs        outputs    inputs        outputs
                wire                                   sum of D                 sum of D      gather V
    int8, int4  splits    heads           heads        outputs       outputs    outputs       outputs
                wire                                   gather H, D              gather F, D   gather V

A product over split inputs adds its parts in another order than one process does. The float path allows that
(DTensor, by `parallelize_module`). The quantized one splits every weight by outputs, so that one rank computes
each number as a single process would: logits have equal bits for every K, for (H + F + 2 D)/4 D times the bytes.

D width · H query heads times head width · F feed-forward width · V vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.block_formats import TILE
from ..model import Mistral7B
from ..quantization.linear import BlockLinear
from ..surgery import replace_linears
from . import ranks

ROWWISE = ("wo", "w2")  # what is split by inputs where sums may have another order


class GatheredLinear(nn.Module):
    """A Linear of which every rank computes some outputs; all ranks get all of them.

    `inputs` are the sizes of the ranks' parts of x, which are gathered first; () if x is whole.
    """

    def __init__(self, part: nn.Module, outputs: Sequence[int], inputs: Sequence[int] = ()) -> None:
        super().__init__()
        self.part, self.outputs, self.inputs = part, tuple(outputs), tuple(inputs)
        self.in_features = sum(inputs) or part.in_features
        self.out_features = sum(outputs)

    def forward(self, x: Tensor) -> Tensor:  # (..., K), or this rank's part of it -> (..., N)
        return gathered(self.part(gathered(x, self.inputs) if self.inputs else x), self.outputs)


def gathered(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The parts (..., sizes[r]) of all ranks, one after another: (..., sum)."""
    mine = F.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine)
    return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], -1)


def parallelize(model: Mistral7B, field: str = "tensor_parallel") -> Mistral7B:
    """Divide a loaded model among all ranks of the run, in place; returns it, unchanged if there is one rank.

    `model.args` then has the heads of this rank, for which caches are made. ConfigError if the number of ranks
    does not divide the heads, or the model is quantized other than to block formats on a CPU.
    """
    if (k := ranks.size()) == 1:
        return model
    args = model.args
    ranks.check_divides(field, k, n_kv_heads=args.n_kv_heads, n_heads=args.n_heads)
    ranks.start()
    linears = [m for m in model.modules() if hasattr(m, "in_features")]
    if all(type(m) is nn.Linear for m in linears):
        ranks.check_divides(field, k, hidden_dim=args.hidden_dim)
        _by_sums(model)
    elif all(isinstance(m, BlockLinear) for m in linears):
        if args.head_dim * args.n_kv_heads % (k * TILE):
            raise ConfigError(
                f"{args.n_kv_heads // k} heads of width {args.head_dim} are no whole tiles of {TILE} outputs",
                field=field,
                hint="start fewer processes, or leave the model unquantized",
            )
        _by_outputs(model)
    else:
        kinds = ", ".join(sorted({type(m).__name__ for m in linears}))
        raise ConfigError(
            f"a model of {kinds} cannot be divided among processes",
            field=field,
            hint="divide one in float32 or bfloat16, or quantized to int8, q6_k, q4_k_m or int4 on a CPU",
        )
    model.args = dataclasses.replace(args, n_heads=args.n_heads // k, n_kv_heads=args.n_kv_heads // k)
    torch.manual_seed(ranks.first(torch.initial_seed))  # requests without a seed draw equal ones
    return model


def _by_sums(model: Mistral7B) -> None:
    """Split pairs of Linears by outputs, then inputs, as DTensors whose sums are all-reduced."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(model.norm.weight.device.type, (ranks.size(),))
    plan = {
        f"layers.*.{module}.{name}": RowwiseParallel() if name in ROWWISE else ColwiseParallel()
        for module, names in (("attention", ("wq", "wk", "wv", "wo")), ("feed_forward", ("w1", "w2", "w3")))
        for name in names
    }
    parallelize_module(
        model, mesh, {**plan, "output": ColwiseParallel(output_layouts=Replicate())}, src_data_rank=None
    )


def _by_outputs(model: Mistral7B) -> None:
    """Split every Linear by outputs, in whole tiles."""
    k = ranks.size()

    def sizes(outputs: int) -> list[int]:
        tiles = -(-outputs // TILE)
        ends = [min(outputs, (r + 1) * tiles // k * TILE) for r in range(k)]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

    def build(linear: nn.Module, name: str) -> nn.Module:
        assert isinstance(linear, BlockLinear)
        last, outputs = name.split(".")[-1], sizes(linear.out_features)
        begin = sum(outputs[: ranks.rank()])
        end = begin + outputs[ranks.rank()]
        tiles = slice(begin // TILE, -(-end // TILE))  # a view: of a mapped file only these are read
        part = BlockLinear.of_tiles(
            linear.kind, linear.codes[tiles], linear.d[tiles], linear.in_features, end - begin
        )
        if last in ROWWISE:
            return GatheredLinear(part, outputs, sizes(linear.in_features))
        return GatheredLinear(part, outputs) if last == "output" else part

    replace_linears(model, build, lambda _, module: isinstance(module, BlockLinear))
