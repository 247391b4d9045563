// Attention of one head's query rows over one block of keys and values, in one thread's workspace: scores, softmax
// over the block, and the weighted sum of values. AMX tiles round and sum differently from other instruction sets.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "keys.h"
#include "amx.h"
#include "weights.h"
#include "vectors.h"

namespace {

struct Workspace {  // of one thread
    int64_t D32;
    uint16_t *k, *v, *q, *p;  // AMX: k (D/2, 64, 2), v (32, D, 2); q (rows, D), p (rows, 64)
    uint16_t* line;           // rows as they are stored: keys and values (2, 64, D), or float keys (64, D)
    float *kf, *vf;           // without AMX: k (D, 64), v (64, D)
    float *s, *o, *max, *sum, *k_scale, *v_scale;
};

// On vectors alone. Rows share each load of a key or value; as many columns are summed together as fit the registers.
constexpr int64_t FEW = 4, COLUMNS = REGISTER == 64 ? 4 : 1;

// f(first row, number of rows as a constant) for all rows.
template <class F>
void some_rows(int64_t rows, F f) {
    int64_t m = 0;
    for (; m + FEW <= rows; m += FEW) f(m, std::integral_constant<int64_t, FEW>());
    for (; m < rows; m++) f(m, std::integral_constant<int64_t, 1>());
}

// keys (64, D32) to k (D32, 64), a square of registers at a time.
template <class P>
void pack_keys(const P* keys, int64_t D32, float* k) {
    constexpr int N = REGISTER / 4;
    for (int64_t j = 0; j < KEYS; j += N)
        for (int64_t d = 0; d < D32; d += N) {
            FloatRegister square[N];
            for (int i = 0; i < N; i++) square[i] = load_register(keys + (j + i) * D32 + d);
            transpose(square);
            for (int i = 0; i < N; i++) std::memcpy(k + (d + i) * KEYS + j, &square[i], REGISTER);
        }
}

inline float number(float v) { return v; }
inline float number(uint16_t v) { return from_bf16(v); }

// s (R, 64) = q (R, D) K^T, each sum in the order of d; k (D, 64).
template <int64_t R, class Q>
void score_rows(const Q* const* q, const float* k, int64_t D, float* s) {
    for (int64_t j = 0; j < KEYS; j += 16 * COLUMNS) {
        F16 sum[R][COLUMNS] = {};
        for (int64_t d = 0; d < D; d++)
            for (int i = 0; i < COLUMNS; i++) {
                const F16 key = load(k + d * KEYS + j + 16 * i);
                for (int64_t m = 0; m < R; m++) sum[m][i] += number(q[m][d]) * key;
            }
        for (int64_t m = 0; m < R; m++)
            for (int i = 0; i < COLUMNS; i++) store(s + m * KEYS + j + 16 * i, sum[m][i]);
    }
}

// o (R, D32) += p (R, 64) V over the keys first..last, in their order; v (64, D32).
template <int64_t R, class P>
void value_rows(const P* p, const float* v, int64_t D32, int64_t first, int64_t last, float* o) {
    for (int64_t d = 0; d < D32; d += 16 * COLUMNS) {
        F16 sum[R][COLUMNS];
        for (int64_t m = 0; m < R; m++)
            for (int i = 0; i < COLUMNS; i++) sum[m][i] = load(o + m * D32 + d + 16 * i);
        for (int64_t j = first; j < last; j++)
            for (int i = 0; i < COLUMNS; i++) {
                const F16 value = load(v + j * D32 + d + 16 * i);
                for (int64_t m = 0; m < R; m++) sum[m][i] += number(p[m * KEYS + j]) * value;
            }
        for (int64_t m = 0; m < R; m++)
            for (int i = 0; i < COLUMNS; i++) store(o + m * D32 + d + 16 * i, sum[m][i]);
    }
}

#if defined(WITH_AMX)

constexpr int64_t ROWS_TOGETHER = 16;  // of a tile

// Transposes 16 rows of 16 dwords: out[i][j] = in[j][i].
inline void transpose(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * out_stride, r[i]);
}

// Interleaves two rows of 32: (a0, b0, a1, b1, ...).
inline void pair_rows(const uint16_t* a, const uint16_t* b, uint16_t* out) {
    alignas(64) static const struct Order {
        uint16_t first[32], second[32];
        Order() {
            for (int i = 0; i < 16; i++) {
                first[2 * i] = i, first[2 * i + 1] = 32 + i;
                second[2 * i] = 16 + i, second[2 * i + 1] = 48 + i;
            }
        }
    } order;
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(x, _mm512_load_si512(order.first), y));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(x, _mm512_load_si512(order.second), y));
}

// With at most this many rows, as in decode, the keys are the left operand without repacking: a few queries and scores
// are transposed instead of 64 keys. The order of sums is the same, so both cases are bit-identical.
constexpr int64_t KEYS_LEFT = 32;

// Packs queries as the right operand: 16 rows become (D / 2, 16, 2).
void pack_queries(const Workspace& r, int64_t rows) {
    for (int64_t m = 0; m < rows && rows <= KEYS_LEFT; m += 16) {
        uint16_t* q = r.q + m * r.D32;
        std::memcpy(r.k, q, 16 * r.D32 * 2);
        for (int64_t d = 0; d < r.D32; d += 32)
            transpose(reinterpret_cast<uint32_t*>(r.k + d), r.D32 / 2, reinterpret_cast<uint32_t*>(q) + d / 2 * 16, 16);
    }
}

void pack_block(const Workspace& r, int64_t rows) {  // r.line (2, 64, D32): keys, then values
    for (int64_t j = 0; j < KEYS && rows > KEYS_LEFT; j += 16)
        for (int64_t d = 0; d < r.D32; d += 32)
            transpose(reinterpret_cast<uint32_t*>(r.line + j * r.D32 + d), r.D32 / 2, reinterpret_cast<uint32_t*>(r.k) + d / 2 * KEYS + j, KEYS);
    const uint16_t* values = r.line + KEYS * r.D32;
    for (int64_t j = 0; j < KEYS; j += 2)
        for (int64_t d = 0; d < r.D32; d += 32)
            pair_rows(values + j * r.D32 + d, values + (j + 1) * r.D32 + d, r.v + j * r.D32 + 2 * d);
}

// C (16, 64) = A (16, depth) B: A by rows of lda, B (depth / 2, columns, 2) with `ldb` columns; added to C unless first.
void product(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, bool first, int64_t count) {
    fence();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!first) {
        _tile_loadd(0, c, ldc * 4);
        if (count > 1) _tile_loadd(1, c + 16, ldc * 4);
        if (count > 2) _tile_loadd(2, c + 32, ldc * 4);
        if (count > 3) _tile_loadd(3, c + 48, ldc * 4);
    }
    for (int64_t i = 0; i < depth; i += 32) {
        const uint16_t* at = b + i * ldb;
        _tile_loadd(4, a + i, lda * 2);
        _tile_loadd(5, at, ldb * 4);
        _tile_dpbf16ps(0, 4, 5);
        if (count > 1) {
            _tile_loadd(6, at + 32, ldb * 4);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (count > 2) {
            _tile_loadd(7, at + 64, ldb * 4);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (count > 3) {
            _tile_loadd(5, at + 96, ldb * 4);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, c, ldc * 4);
    if (count > 1) _tile_stored(1, c + 16, ldc * 4);
    if (count > 2) _tile_stored(2, c + 32, ldc * 4);
    if (count > 3) _tile_stored(3, c + 48, ldc * 4);
    fence();
}

// C (64, 16) = A (64, depth) B: A by rows, B (depth / 2, 16, 2).
void product_left(const uint16_t* a, const uint16_t* b, int64_t depth, float* c) {
    fence();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < depth; i += 32) {
        _tile_loadd(4, b + i * 16, 64);
        _tile_loadd(5, a + i, depth * 2);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(6, a + 16 * depth + i, depth * 2);
        _tile_dpbf16ps(1, 6, 4);
        _tile_loadd(7, a + 32 * depth + i, depth * 2);
        _tile_dpbf16ps(2, 7, 4);
        _tile_loadd(5, a + 48 * depth + i, depth * 2);
        _tile_dpbf16ps(3, 5, 4);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
    fence();
}

void scores(const Workspace& r, int64_t rows) {
    for (int64_t m = 0; m < rows; m += 16) {
        const uint16_t* q = r.q + m * r.D32;
        float* s = r.s + m * KEYS;
        if (rows > KEYS_LEFT) {
            product(q, r.D32, r.k, KEYS, r.D32, s, KEYS, true, 4);
            continue;
        }
        alignas(64) float transposed[KEYS * 16];
        product_left(r.line, q, r.D32, transposed);
        for (int64_t j = 0; j < KEYS; j += 16)
            transpose(reinterpret_cast<uint32_t*>(transposed + j * 16), 16, reinterpret_cast<uint32_t*>(s + j), KEYS);
    }
}

void add_values(const Workspace& r, int64_t rows) {
    for (int64_t m = 0; m < rows; m += 16)
        for (int64_t d = 0; d < r.D32; d += 64)
            product(r.p + m * KEYS, KEYS, r.v + 2 * d, r.D32, KEYS, r.o + m * r.D32 + d, r.D32, false, (r.D32 - d) / 16);
}

#else

constexpr int64_t ROWS_TOGETHER = 1;

void pack_queries(const Workspace&, int64_t) {}

void pack_block(const Workspace& r, int64_t) {
    pack_keys(r.line, r.D32, r.kf);
    const uint16_t* values = r.line + KEYS * r.D32;
    for (int64_t i = 0; i < KEYS * r.D32; i += 16) store(r.vf + i, load(values + i));
}

void scores(const Workspace& r, int64_t rows) {
    some_rows(rows, [&](int64_t m, auto n) {
        const uint16_t* q[n];
        for (int64_t i = 0; i < n; i++) q[i] = r.q + (m + i) * r.D32;
        score_rows<n>(q, r.kf, r.D32, r.s + m * KEYS);
    });
}

void add_values(const Workspace& r, int64_t rows) {
    some_rows(rows, [&](int64_t m, auto n) { value_rows<n>(r.p + m * KEYS, r.vf, r.D32, 0, KEYS, r.o + m * r.D32); });
}

#endif

// Softmax over one block of a row's scores, with visible keys first..last, to row m of p; updates the running maximum
// and sum.
template <class P>
void softmax_block(const Workspace& r, P* p, int64_t m, int64_t first, int64_t last, float scale) {
    if (first >= last) {
        std::memset(p + m * KEYS, 0, KEYS * sizeof(P));
        return;
    }
    float* row = r.s + m * KEYS;
    constexpr int32_t LANE_NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I16 lane = load(LANE_NUMBERS);
    F16 s[4], max = broadcast(-3.0e38f);
    for (int i = 0; i < 4; i++) {
        s[i] = load(row + 16 * i) * scale * load(r.k_scale + 16 * i);
        const I16 key = lane + 16 * i;
        s[i] = select((key >= int32_t(first)) & (key < int32_t(last)), s[i], broadcast(-3.0e38f));
        max = maximum(max, s[i]);
    }
    const float old_max = r.max[m], new_max = std::max(old_max, reduce_max(max));
    if (new_max > old_max) {
        const F16 rescale = exponential(broadcast(old_max - new_max));
        float* o = r.o + m * r.D32;
        for (int64_t d = 0; d < r.D32; d += 16) store(o + d, load(o + d) * rescale);
        store(r.sum + 16 * m, load(r.sum + 16 * m) * rescale);
        r.max[m] = new_max;
    }
    F16 sum = load(r.sum + 16 * m);
    for (int i = 0; i < 4; i++) {
        const F16 e = exponential(s[i] - new_max);
        sum += e;
        store(p + m * KEYS + 16 * i, e * load(r.v_scale + 16 * i));
    }
    store(r.sum + 16 * m, sum);
}

}  // namespace
