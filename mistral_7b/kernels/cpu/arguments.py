"""The arguments of the C++ functions: structures with the names and fields of those in cpu/, in the same order.

A structure holds pointers, not references: the caller must keep the tensors alive while it is used.

M rows · K inputs, N outputs, Kp inputs with padding · D width of a row or of a head · H query heads ·
G key/value heads · `bf16`: values are bfloat16, else float32
"""

from __future__ import annotations

import ctypes

PTR, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
Fields = tuple[tuple[str, type], ...]


def _fields(kind: type, names: str) -> Fields:
    return tuple((name, kind) for name in names.split())


class Weights(ctypes.Structure):
    """A quantized weight (weights.h). `adapters` and `mixture` give the LoRA update of its product; 0: none."""

    _fields_ = (
        *_fields(LONG, "N Kp"), *_fields(PTR, "codes d"), *_fields(INT, "kind"), *_fields(PTR, "adapters mixture"),
    )  # fmt: skip


class LowRank(ctypes.Structure):
    """The factors of one adapter for one product (low_rank.h)."""

    _fields_ = (*_fields(LONG, "rank"), *_fields(PTR, "a b"))


class Mixture(ctypes.Structure):
    """The adapter of each row of a call (low_rank.h)."""

    _fields_ = (*_fields(LONG, "n"), *_fields(PTR, "which counts rows"), *_fields(LONG, "total refused"))


class Block(ctypes.Structure):
    """The weights of a transformer block (layers.h)."""

    _fields_ = (
        *_fields(Weights, "wq wk wv wo w1 w2 w3"), *_fields(PTR, "attention_norm ffn_norm"),
        *_fields(LONG, "dim head_dim"), *_fields(FLOAT, "eps"),
    )  # fmt: skip


class Place(ctypes.Structure):
    """Where keys and values are stored (keys.h)."""

    _fields_ = (
        *_fields(LONG, "B N"), *_fields(PTR, "offsets start held"), *_fields(LONG, "slots origin"),
        *_fields(PTR, "table"), *_fields(LONG, "columns page window"),
    )  # fmt: skip


class LinearCall(ctypes.Structure):
    """out (M, N) = x (M, K) times a weight."""

    _fields_ = (*_fields(PTR, "weight x out"), *_fields(LONG, "M K"), *_fields(INT, "bf16 threads"))


class DequantizeCall(ctypes.Structure):
    """out (N, width) = the inputs first .. first + width of a weight's rows (dequantize.h)."""

    _fields_ = (*_fields(PTR, "weight out"), *_fields(LONG, "first width"), *_fields(INT, "bf16 threads"))


class LowRankCall(ctypes.Structure):
    """y (M, N) += the LoRA update of x (M, K)."""

    _fields_ = (*_fields(PTR, "adapters mixture x y"), *_fields(LONG, "M K N"), *_fields(INT, "bf16 threads"))


class RMSNormCall(ctypes.Structure):
    """out (M, D) = RMSNorm of x (M, D) with weight (D,)."""

    _fields_ = (
        *_fields(PTR, "x weight out"), *_fields(LONG, "M D"), *_fields(FLOAT, "eps"),
        *_fields(INT, "bf16 threads"),
    )  # fmt: skip


class RMSNormBackCall(ctypes.Structure):
    """out (M, D) = the gradient of x (M, D) of RMSNorm, from that of its result."""

    _fields_ = (
        *_fields(PTR, "x weight grad out"), *_fields(LONG, "M D"), *_fields(FLOAT, "eps"),
        *_fields(INT, "bf16 threads"),
    )  # fmt: skip


class SiluMulCall(ctypes.Structure):
    """out (n,) = silu(gate) * up."""

    _fields_ = (*_fields(PTR, "gate up out"), *_fields(LONG, "n"), *_fields(INT, "bf16 threads"))


class SiluMulBackCall(ctypes.Structure):
    """d_gate, d_up (n,) = the gradients of silu(gate) * up, from that of the product."""

    _fields_ = (*_fields(PTR, "gate up grad d_gate d_up"), *_fields(LONG, "n"), *_fields(INT, "bf16 threads"))


class RotateCall(ctypes.Structure):
    """out (M, heads, D) = x rotated by cos, sin (angles, D/2), repeated if M is a multiple of `angles`."""

    _fields_ = (
        *_fields(PTR, "x cos sin out"), *_fields(LONG, "M angles heads D"), *_fields(INT, "bf16 threads"),
    )  # fmt: skip


class Attend(Place):
    """out = attention of bfloat16 or float32 q (N, H, D) over new and cached keys and values (keys.h)."""

    _fields_ = (
        *_fields(LONG, "H G D"), *_fields(PTR, "q k v k_scale v_scale old_k old_v old_k_scale old_v_scale out"),
        *_fields(INT, "bf16 int8 keep threads"),
    )  # fmt: skip


class ProjectCall(ctypes.Structure):
    """q (M, H, D), k and v (M, G, D) of a block's normalized input x (M, dim), with RoPE applied to q and k."""

    _fields_ = (
        *_fields(PTR, "block x cos sin q k v"), *_fields(LONG, "M angles"), *_fields(INT, "bf16 threads"),
    )  # fmt: skip


class FinishBlockCall(ctypes.Structure):
    """A block's output (M, dim) from its input x (M, dim) and its attention output (M, H, D)."""

    _fields_ = (*_fields(PTR, "block x attended out"), *_fields(LONG, "M"), *_fields(INT, "bf16 threads"))


class LayersCall(ctypes.Structure):
    """All blocks applied to bfloat16 x (N, dim), in place, with the cache described by `attend` (layers.h)."""

    _fields_ = (
        ("attend", Attend), *_fields(PTR, "blocks entries x cos sin"), *_fields(LONG, "layers angles"),
    )  # fmt: skip


class RoundCall(ctypes.Structure):
    """Codes q, integer scales and d of x (N, K) rounded to Q4_K, or to Q6_K (rounding.h). `importance` 0: none."""

    _fields_ = (*_fields(PTR, "x importance q scales d"), *_fields(LONG, "N K"), *_fields(INT, "q6 bf16 threads"))


class FeedbackCall(ctypes.Structure):
    """q of C columns of w (N, C), rounded with error feedback (rounding.h); w becomes their errors."""

    _fields_ = (
        *_fields(PTR, "target w factor step q"), *_fields(LONG, "N C"), *_fields(FLOAT, "low high"),
        *_fields(INT, "threads"),
    )  # fmt: skip
