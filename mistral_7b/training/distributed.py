"""Training over several processes: in shards, in divided layers, or in replicas.

    update n   `accumulate` parts, the same for every number of ranks W; rank r computes parts r, r + W, r + 2W...
    full       FSDP2: a rank keeps 1/W of weights, masters and AdamW; gradients are reduce-scattered
    full, tensor_parallel = W    every rank computes all parts, on its part of every layer
    adapters   the base is whole on every rank; gradients of the adapter are all-reduced

A saved state is a folder of safetensors by torch.distributed.checkpoint, which any number of ranks resumes from:

    shards-000200/   after update 200: masters and AdamW's moments by name, and run.json, written last

Pipeline and context parallelism are not here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..distributed import ranks
from ..distributed.tensor_parallel import parallelize
from ..errors import TrainingError, WriteError, first_line
from ..files import check_room
from ..model import Mistral7B, ModelArgs
from .finetune_args import FinetuneArgs
from .states import SHARDS
from .weights import Weights

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
RUN = "run.json"


def share_of(args: FinetuneArgs) -> ranks.Share:
    """Connect the ranks, and return the parts of an update that this one computes.

    TrainingError if the method cannot run on so many processes.
    """
    w = ranks.size()
    if args.tensor_parallel > 1 and args.tensor_parallel != w:
        raise TrainingError(
            f"tensor_parallel {args.tensor_parallel} needs as many processes, and this run has {w}",
            field="tensor_parallel",
            hint=f"start it with torchrun --nproc-per-node {args.tensor_parallel}",
        )
    if w > 1 and args.method == "grpo":
        raise TrainingError("grpo samples in one process", field="method", hint="start it without torchrun")
    ranks.start()
    if args.tensor_parallel > 1:
        return ranks.Share()
    if args.accumulate % w:
        raise TrainingError(
            f"{w} processes cannot share the {args.accumulate} parts of an update",
            field="accumulate",
            hint=f"set it to a multiple of {w} that divides rows ({args.rows})",
        )
    return ranks.Share(ranks.rank(), w)


def divide(model: Mistral7B, tensor_parallel: int) -> None:
    """Divide a model whose weights are all trained among the ranks, in place: in layers, or in shards."""
    if tensor_parallel > 1:
        parallelize(model)
        return
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # rotary angles stay float32
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(False, recurse=False)  # of each chunk of the loss; `publish` does
    for method in ("hidden", "logits"):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # losses are normalized over the whole update: sums, not means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class RankWeights(Weights):
    """The trained weights of one rank: its shards of DTensors, and all of what is whole on every rank."""

    def __init__(self, model: Mistral7B, parameters: Mapping[str, nn.Parameter], share: ranks.Share) -> None:
        super().__init__(parameters)
        self.model, self.share = model, share

    def own(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def clip(self, most: float) -> Tensor:
        """Sum the gradients of replicas, and clip by the norm over all ranks, each shard counted once."""
        grads = [m.grad for m in self.masters if m.grad is not None]
        if self.share.replicas > 1 and not isinstance(self.weights[0], DTensor):  # an adapter
            dist.all_reduce(flat := torch.cat([g.flatten() for g in grads]))
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        squares = torch.zeros(2, device=self.masters[0].device)
        for grad, weight in zip(grads, self.weights, strict=True):
            shard = isinstance(weight, DTensor) and any(p.is_shard() for p in weight.placements)
            squares[int(shard)] += grad.square().sum()
        dist.all_reduce(squares[1])
        norm = squares.sum().sqrt()
        nn.utils.clip_grads_with_norm_(self.masters, most, norm)
        return norm

    def publish(self) -> None:
        super().publish()
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # what is gathered has the values before

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name, DTensors where they are shards; they share memory with this rank's own."""
        out: dict[str, Tensor] = {}
        for name, weight, own in self._states():
            if isinstance(weight, DTensor):
                own = DTensor.from_local(
                    own, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape,
                    stride=weight.stride(),
                )  # fmt: skip
            out[name] = own
        return out

    def _states(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        states = {id(m): o.state[m] for o in self.optimizers for g in o.param_groups for m in g["params"]}
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            state = states[id(master)]
            if not state:  # before the first update
                state["step"] = torch.zeros((), device=master.device)
                state.update({moment: torch.zeros_like(master) for moment in MOMENTS})
            yield f"master.{name}", weight, master
            yield from ((f"{moment}.{name}", weight, state[moment]) for moment in MOMENTS)

    def save(self, run: Mapping[str, Any], path: Path, keep: int) -> None:
        """Write a folder beside `path`, complete or not at all, and remove those before the last `keep`."""
        folder = path.with_name(f"{SHARDS}-{run['step']:06d}")
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            if ranks.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                check_room(partial, self.nbytes() * ranks.size())
            dist.barrier()
            dcp.save(
                self.tensors(), storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            )
            if ranks.rank() == 0:
                (partial / RUN).write_text(json.dumps(run), encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
                for old in sorted(path.parent.glob(f"{SHARDS}-[0-9]*"))[:-keep]:
                    shutil.rmtree(old)
            dist.barrier()
        except (OSError, dcp.CheckpointException) as error:
            raise WriteError(f"the state cannot be saved ({first_line(error)})", place=folder) from error

    def read(self, path: Path, device: torch.device | str) -> dict[str, Any] | None:
        """Return what run.json of the last state says; None if there is no state."""
        found = ranks.first(lambda: max(map(str, path.parent.glob(f"{SHARDS}-[0-9]*")), default=None))
        if found is not None:
            return {**json.loads((Path(found) / RUN).read_text(encoding="utf-8")), "folder": found}
        if ranks.first(path.exists):
            raise TrainingError(
                "is the state of a run in one process",
                field="out",
                place=path,
                hint="resume without torchrun, or give another --out to start again",
            )
        return None

    def load_state(self, state: Mapping[str, Any]) -> None:
        try:
            dcp.load(self.tensors(), storage_reader=dcp.HuggingFaceStorageReader(state["folder"]))
        except (OSError, dcp.CheckpointException) as error:
            raise TrainingError(
                f"the state cannot be read ({first_line(error)})", field="out", place=state["folder"]
            ) from error
        for optimizer in self.optimizers:
            for held in optimizer.state.values():
                held["step"].fill_(state["step"])
        self.publish()

    def whole(self, model: Mistral7B, shape: ModelArgs) -> Mistral7B | None:
        """Return the model with whole weights, on rank 0 and its CPU; None on the others."""
        whole: dict[str, Tensor] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            full = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if ranks.rank() == 0:
                whole[name] = full.detach().cpu()
        if not whole:
            return None
        out = Mistral7B(shape, dtype=self.weights[0].dtype, device="meta")
        out.load_state_dict(whole, assign=True, strict=not shape.tie_embeddings)
        out.tie()
        return out
