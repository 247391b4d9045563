"""Measurements of `make gpu-check` for paged attention (kernels/gpu/paged.py): exactness and speed.

Records as in gpu_measures.py. Decode is bounded by reads of keys and values, prefill by matrix products.
"""

from __future__ import annotations

import torch
from gpu_measures import Record, ceilings, seconds
from torch import Tensor

from mistral_7b import ModelArgs
from mistral_7b.kernels.attend import Place, Remembered, attend_twin, quantize_kv
from mistral_7b.kernels.backend import PAGED_ATTENTION, Backend, choose
from mistral_7b.kernels.gpu.paged import paged_attend

PAGE = 16
Entries = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # k, v and their scales


def entries(k: Tensor, v: Tensor, int8: bool) -> Entries:
    if not int8:
        return k, v, None, None
    (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
    return k, v, k_scale, v_scale


def place_of(starts: list[int], lengths: list[int], device: torch.device) -> Place:
    """Return sequences with these start positions and numbers of new tokens, in shuffled pages."""
    columns = max(-(-(s + n) // PAGE) for s, n in zip(starts, lengths, strict=True))
    table = torch.randperm(len(starts) * columns, device=device).view(len(starts), columns)
    start, offsets = torch.tensor(starts, device=device), torch.tensor([0, *lengths], device=device).cumsum(0)
    return Place(start, start.clone(), 1, 0, table, PAGE, offsets)


def attended(q: Tensor, new: Entries, old: Entries, place: Place, window: int | None) -> Tensor:
    """Run the kernel without writing to the cache."""
    return paged_attend(q, *new, Remembered(*old, place), window, keep=False)


@torch.inference_mode()
def over_pages(device: torch.device, args: ModelArgs) -> list[Record]:
    """Measure exactness and speed with a KV cache in bfloat16 and in int8."""
    if (choice := choose(PAGED_ATTENTION, torch.empty(1, device=device))).backend is not Backend.TRITON:
        why = f"{choice.reason}; tests/kernels run it in Triton's interpreter, if it is installed"
        return [{"what": "attention over pages", "skipped": why}]
    bandwidth, peak, _ = ceilings(device)
    records = []
    for int8 in (False, True):
        records += exactness(device, args, int8) + speed(device, args, int8, bandwidth, peak)
    return records


def exactness(device: torch.device, args: ModelArgs, int8: bool) -> list[Record]:
    """Compare a prompt with the twin, and with its own rows in chunks and single tokens."""
    H, G, K, W = args.n_heads, args.n_kv_heads, args.head_dim, args.sliding_window
    T, label = 1500, "int8" if int8 else "bf16"
    q = torch.randn(T, H, K, device=device).bfloat16()
    k, v = (torch.randn(T, G, K, device=device).bfloat16() for _ in "kv")
    whole_place = place_of([0], [T], device)
    assert whole_place.table is not None
    empty = torch.zeros(whole_place.table.numel(), PAGE, G, K, device=device).bfloat16()
    old = entries(empty, empty.clone(), int8)
    new = entries(k, v, int8)
    whole = paged_attend(q, *new, Remembered(*old, whole_place), W)
    wanted = attend_twin(q, *new, Remembered(*old, whole_place), W)
    far = float((whole.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    alike = True
    for start, n in ((0, 1), (T - 1, 1), (511, 2), (700, 3), (640, 65), (100, 1000)):
        at = torch.tensor([start], device=device)
        place = whole_place._replace(start=at, held=at, offsets=torch.tensor([0, n], device=device))
        part: Entries = tuple(None if t is None else t[start : start + n] for t in new)  # type: ignore[assignment]
        alike &= torch.equal(attended(q[start : start + n], part, old, place, W), whole[start : start + n])
    return [
        {"what": f"attention over pages {label} against its twin", "value": far, "unit": "", "ok": far < 2.0**-7},
        {
            "what": f"attention over pages {label}: rows the same in any chunk",
            "value": alike,
            "unit": "",
            "ok": alike,
        },
    ]


def speed(device: torch.device, args: ModelArgs, int8: bool, bandwidth: float, peak: float) -> list[Record]:
    """Measure one layer: the time of one row, bytes per second of 32 rows, operations per second of a prompt."""
    H, G, K, W = args.n_heads, args.n_kv_heads, args.head_dim, args.sliding_window
    held, label = W or 4096, "int8" if int8 else "bf16"
    records: list[Record] = []
    for B, n in ((1, 1), (32, 1), (1, 2048)):
        place = place_of([held] * B, [n] * B, device)
        assert place.table is not None
        pages, rows = (place.table.numel(), PAGE, G, K), (B * n, G, K)
        pairs = (torch.randn(2, *shape, device=device).bfloat16() for shape in (pages, rows))
        old, new = (entries(pair[0], pair[1], int8) for pair in pairs)
        q = torch.randn(B * n, H, K, device=device).bfloat16()

        def run(q: Tensor = q, new: Entries = new, old: Entries = old, place: Place = place) -> None:
            for _ in range(20):
                attended(q, new, old, place, W)

        taken = seconds(run, device) / 20
        what = f"attention over pages {label}, {B if n == 1 else n} after {held}"
        record = {"what": what, "value": taken * 1e6, "unit": "us"}  # one row's keys may stay in the GPU's cache
        if n > 1:
            seen = held if W else held + n / 2  # a window full of keys, or on average
            work = 4 * n * seen * H * K
            record |= {"value": work / taken / 1e12, "unit": "TFLOP/s", "of_ceiling": work / taken / peak}
        elif B > 1:
            read = B * held * G * 2 * (K + 4 if int8 else 2 * K)
            record |= {"value": read / taken / 1e9, "unit": "GB/s", "of_ceiling": read / taken / bandwidth}
        records.append(record)
    return records
