"""Measurements of `make gpu-check`: ceilings, kernels compared with their twins, decode and prefill by scheme.

Records are dictionaries {what, value, unit, of_ceiling?, ok?}, or {what, skipped} if a measurement is not
possible. A decode step reads every weight except the embedding once, and the visible keys and values. Its
ceiling is the bandwidth of a large copy, counting reads and writes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mistral_7b import EngineConfig, Mistral7B, ModelArgs, SamplingParams
from mistral_7b.attention import visible
from mistral_7b.engine import engine as loop
from mistral_7b.engine.forward import Forward, GraphForward
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import open_engine
from mistral_7b.generate import generate
from mistral_7b.kernels import elementwise
from mistral_7b.kernels.backend import WEIGHT_ONLY, Backend, choose, has_fp8, uses
from mistral_7b.kernels.block_formats import FORMATS, padded
from mistral_7b.kernels.gpu import elementwise as gpu
from mistral_7b.kernels.gpu import weight_only as w
from mistral_7b.kernels.gpu.decode_attention import decode_attention, decode_attention_twin
from mistral_7b.quantization.fused import fuse
from mistral_7b.quantization.gpu import Fp8Linear, GpuBlockLinear
from mistral_7b.quantization.schemes import Scheme
from mistral_7b.surgery import replace_linears

Record = dict[str, Any]
SCHEMES = ("bf16", "int8", "q6_k", "q4_k_m", "int4", "fp8")
BLOCK_FORMATS = ("Q8_0", "Q4_K", "Q6_K", "Q4_1")  # in 8 and 4 bits, with and without integer scales and minima
ROWS = (1, 2, 3, 16, 17, 64, 300)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(work: Callable[[], object], device: torch.device, times: int = 7, warm: int = 2) -> float:
    """Return the median wall time of `work`, after `warm` warmup runs."""
    taken = []
    for i in range(warm + times):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if i >= warm:
            taken.append(time.perf_counter() - began)
    return sorted(taken)[times // 2]


def ceilings(device: torch.device) -> tuple[float, float, list[Record]]:
    """Return bytes per second of a large copy, operations per second of a bfloat16 product, and their records."""
    big = device.type != "cpu"
    source = torch.empty(2**30 if big else 2**26, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    bandwidth = 20 * 2 * source.numel() / seconds(lambda: [target.copy_(source) for _ in range(20)], device)
    n = 8192 if big else 512
    a = torch.randn(n, n, device=device).bfloat16()
    b = torch.randn(n, n, device=device).bfloat16()
    peak = 10 * 2 * n**3 / seconds(lambda: [a @ b for _ in range(10)], device)
    return (
        bandwidth,
        peak,
        [
            {"what": "ceiling: copy, read and written", "value": bandwidth / 1e9, "unit": "GB/s"},
            {"what": f"ceiling: bf16 product of {n}", "value": peak / 1e12, "unit": "TFLOP/s"},
        ],
    )


def random_linear(linear: nn.Module, name: str, scheme: str, n_layers: int) -> nn.Module:
    """Return a Linear of this shape and scheme with random codes: speed does not depend on the values."""
    if scheme == "fp8":
        return Fp8Linear.from_weight(linear.weight)
    N, K = linear.weight.shape
    return GpuBlockLinear(random_weight(Scheme(scheme).kind(name, n_layers), N, K, linear.weight.device, 2.0**-14))


def random_weight(kind: str, N: int, K: int, device: torch.device, d: float | Tensor) -> w.RowMajor:
    """Return a weight of random codes, integer scales of 1 or 2, and d as scale and minimum, of all or (N, 1)."""
    f = FORMATS[kind]
    width, bits = padded(K), w.stored_bits(f)
    codes = torch.randint(0, 256, (N, width * bits // 8), dtype=torch.uint8, device=device)
    if bits == 8:
        codes &= 2 ** (f.low + f.high) - 1
    draw = functools.partial(torch.randint, 1, 3, dtype=torch.int8, device=device)
    scales = draw((1 + f.minimum, N, width // f.group)) if f.scales else None
    halves = torch.ones(1 + f.minimum, N, f.blocks(K), dtype=torch.float16, device=device) * d
    return w.RowMajor(kind, K, codes, scales, halves.half())


def model_of(scheme: str, args: ModelArgs, device: torch.device) -> Mistral7B:
    model = Mistral7B(args, device=device)
    if scheme != "bf16":
        replace_linears(model, functools.partial(random_linear, scheme=scheme, n_layers=args.n_layers))
    fuse(model)
    return model


def weight_bytes(model: Mistral7B) -> int:
    """Return the bytes of weights that a decode step reads."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(t.numel() * t.element_size() for n, t in tensors.items() if not n.startswith("tok_embeddings"))


def decode(model: Mistral7B, label: str, prompt: int, batch: int, bandwidth: float) -> Record:
    """Measure tokens per second of `batch` sequences in the engine after `prompt` tokens, including readback."""
    device, args = model.norm.weight.device, model.args
    new, times, warm = 64, 5, 1
    params = SamplingParams(temperature=0, max_tokens=4 + new * (times + warm), ignore_eos=True)
    need = prompt + params.max_tokens  # type: ignore[operator]
    config = EngineConfig(max_sequences=batch, max_batch_tokens=max(512, batch + 16), prefix_caching=False)
    reader = open_engine(model, config, None, None, [need] * batch)
    engine = reader.engine
    for _ in range(batch):
        engine.add(reader.text(torch.randint(3, args.vocab_size, (prompt,)).tolist(), params, RequestOptions()))
    while not all(s.decoding for r in engine.requests.values() for s in r.sequences):
        engine.step()

    def several() -> None:
        for _ in range(new):
            engine.step()

    step = seconds(several, device, times, warm) / new
    held = min(prompt + need // 2, args.sliding_window or need)
    cached = batch * held * args.n_layers * args.n_kv_heads * args.head_dim * 2 * 2
    of = (weight_bytes(model) + cached) / step / bandwidth
    what = f"decode {label}, {batch} after {prompt}, " + ("one graph" if device.type == "cuda" else "not recorded")
    return {"what": what, "value": batch / step, "unit": "tok/s", "of_ceiling": of}


def decode_by_steps(model: Mistral7B, label: str, prompt: int, bandwidth: float) -> Record:
    """Measure decode of one row with every kernel launched separately."""
    device, new = model.norm.weight.device, 32
    cache = model.rolling_cache(1, prompt + 8 * new)
    token = model.logits(model.hidden(torch.full((1, prompt), 5, device=device), cache)[:, -1:]).argmax(-1)

    def several() -> None:
        for _ in range(new):
            model.logits(model.hidden(token, cache)).argmax(-1)

    step = seconds(several, device, 5, 1) / new
    of = weight_bytes(model) / step / bandwidth
    return {"what": f"decode {label}, 1 by steps", "value": 1 / step, "unit": "tok/s", "of_ceiling": of}


def prefill(model: Mistral7B, label: str, prompt: int, peak: float) -> Record:
    """Measure tokens per second of a prompt in one chunk; the ceiling counts matrix products, not attention."""
    device, args = model.norm.weight.device, model.args
    tokens = torch.randint(3, args.vocab_size, (1, prompt), device=device)

    def run() -> None:
        cache = model.rolling_cache(1, prompt)
        model.logits(model.hidden(tokens, cache)[:, -1])

    taken = seconds(run, device)
    block = args.dim * args.head_dim * 2 * (args.n_heads + args.n_kv_heads) + 3 * args.dim * args.hidden_dim
    of = 2 * prompt * args.n_layers * block / taken / peak
    return {"what": f"prefill {label} of {prompt}", "value": prompt / taken, "unit": "tok/s", "of_ceiling": of}


@torch.inference_mode()
def speeds(device: torch.device, args: ModelArgs, prompt: int) -> list[Record]:
    """Measure every scheme: prefill, decode of 1 and 16 rows as a graph, and of one row kernel by kernel."""
    bandwidth, peak, records = ceilings(device)
    for scheme in SCHEMES:
        if scheme == "fp8" and device.type == "cuda" and not has_fp8(device):
            records.append({"what": "fp8", "skipped": "this GPU lacks fp8, which needs compute capability 8.9"})
            continue
        model = model_of(scheme, args, device)
        kernels_run = scheme == "bf16" or uses(Backend.TRITON, WEIGHT_ONLY, model.norm.weight)
        label = scheme if kernels_run else f"{scheme} twin"
        records += [prefill(model, label, n, peak) for n in (prompt, 4 * prompt)]
        records += [decode(model, label, prompt, batch, bandwidth) for batch in (1, 16)]
        records.append(decode_by_steps(model, label, prompt, bandwidth))
        del model
    return records


def kernels(device: torch.device, args: ModelArgs) -> list[Record]:
    """Compare every kernel with its twin on this device, at the model's shapes and at odd ones."""
    if (choice := choose(WEIGHT_ONLY, torch.empty(1, device=device))).backend is not Backend.TRITON:
        why = f"{choice.reason}; tests/kernels run them in Triton's interpreter, if it is installed"
        return [{"what": "kernels against their twins", "skipped": why}]
    records = []
    for N, K in ((args.hidden_dim, args.dim), (args.dim, args.hidden_dim), (333, 1100)):
        records += linears(device, N, K)
    records += betweens(device, args)
    return records


@torch.inference_mode()
def linears(device: torch.device, N: int, K: int) -> list[Record]:
    """Compare kernels with twins on integer activations, whose sums are exact, and rows across batch sizes."""
    scale = 2.0 ** torch.randint(-9, -3, (N, 1), device=device).float()
    fp8 = w.to_fp8(torch.randn(N, K, device=device))
    ways: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {}
    for kind in BLOCK_FORMATS:
        held = random_weight(kind, N, K, device, scale)
        ways[kind] = (
            lambda x, held=held, **how: w.blocks_linear(x, held, **how),
            lambda x, held=held: w.blocks_twin(x, held),
        )
    if has_fp8(device):
        ways["fp8"] = (lambda x, **how: w.fp8_linear(x, *fp8, **how), lambda x: w.fp8_twin(x, *fp8))
    records = []
    for name, (linear, twin) in ways.items():
        far, alike = 0.0, True
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for M in ROWS:
                x = torch.randint(-2, 3, (M, K), device=device).to(dtype)
                wanted = twin(x).double()
                far = max(far, float((linear(x).double() - wanted).abs().max() / wanted.abs().max()))
            x = torch.randn(max(ROWS), K, device=device).to(dtype)
            rows = linear(x, invariant=True)
            alike &= all(torch.equal(linear(x[:M], invariant=True), rows[:M]) for M in ROWS)
            alike &= all(torch.equal(linear(x[:M]), rows[:M]) for M in ROWS if 2 <= M <= w.TILE_ROWS)
        bound = 2.0**-7  # of bfloat16; the value shows exact results
        records.append({"what": f"{name} {N}x{K} against its twin", "value": far, "unit": "", "ok": far < bound})
        records.append(
            {"what": f"{name} {N}x{K}: rows the same in any batch", "value": alike, "unit": "", "ok": alike}
        )
    return records


@torch.inference_mode()
def betweens(device: torch.device, args: ModelArgs) -> list[Record]:
    """Compare RMSNorm, SiLU x mul, RoPE and attention of one token, in bfloat16 at the model's shapes."""
    D, H, G, K = args.dim, args.n_heads, args.n_kv_heads, args.head_dim
    draw = functools.partial(torch.randn, device=device)
    x, y, weight = draw(17, D).bfloat16(), draw(17, D).bfloat16(), draw(D).bfloat16()
    heads, angle = draw(17, H, K).bfloat16(), draw(17, 1, K // 2)
    S = args.sliding_window or 4096
    q, k, v = draw(3, 1, H, K).bfloat16(), draw(3, S, G, K).bfloat16(), draw(3, S, G, K).bfloat16()
    seen = visible(torch.tensor([[0], [300], [S]], device=device), torch.arange(S, device=device).expand(3, -1), S)
    hidden = ~seen[:, 0, :, None, None]
    pairs = {
        "RMSNorm": (gpu.rms_norm(x, weight, 1e-5), elementwise.rms_norm_twin(x, weight, 1e-5)),
        "SiLU x mul": (gpu.silu_mul(x, y), elementwise.silu_mul_twin(x, y)),
        "RoPE": (
            gpu.rotate(heads, angle.cos(), angle.sin()),
            elementwise.rotate_twin(heads, angle.cos(), angle.sin()),
        ),
        "attention of one token": (
            decode_attention(q, *(t.masked_fill(hidden, float("nan")) for t in (k, v)), seen),
            decode_attention_twin(q, k, v, seen),
        ),
    }
    records = []
    for name, (got, wanted) in pairs.items():
        far = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())
        records.append({"what": f"{name} against its twin", "value": far, "unit": "", "ok": far < 2.0**-7})
    return records


def same_tokens(device: torch.device, args: ModelArgs) -> list[Record]:
    """Compare tokens of graphs (on CUDA) and of separate kernels: ragged rows over several windows."""
    records, chosen, cuda = [], loop.forward_for, device.type == "cuda"
    how = "one graph" if cuda else "not recorded"
    graphs = chosen if cuda else GraphForward  # which runs its steps without recording
    for dtype in (torch.float32,) if cuda else (torch.float64, torch.float32):  # float64 is not recorded
        torch.manual_seed(0)
        model = Mistral7B(args, dtype=dtype, device=device).requires_grad_(False)
        for p in model.parameters():
            p.normal_(0, 0.3 if p.dim() == 2 else 1.0)
        prompts = [torch.randint(3, args.vocab_size, (n,)).tolist() for n in (1, 5, 9, 40)]
        for sampling in (SamplingParams(temperature=0), SamplingParams(temperature=1.3, top_p=0.8, seed=1)):
            params = dataclasses.replace(sampling, max_tokens=100, ignore_eos=True)
            tokens = []
            for forward_for in (graphs, lambda adapters, pool, config: Forward(adapters, pool)):
                loop.forward_for = forward_for  # type: ignore[assignment]
                try:
                    tokens.append([o.outputs[0].token_ids for o in generate(model, prompts, params)])
                finally:
                    loop.forward_for = chosen
            same = tokens[0] == tokens[1]
            kind = "greedy" if params.greedy else "sampled"
            what = f"tokens {how} as by steps: {dtype}, {kind}".replace("torch.", "")
            records.append({"what": what, "value": same, "unit": "", "ok": same})
    return records
