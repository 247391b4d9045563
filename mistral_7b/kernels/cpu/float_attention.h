// Attention of float32 queries over one block of keys at a time, by the order of sums of attention.h, on vectors alone.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "keys.h"
#include "scores.h"
#include "vectors.h"

namespace {

constexpr int64_t FEW = 4;  // rows that share each load of a key or value

// Loads keys (D, 64) and values (64, D32) of one head, with their scales. Those of missing keys are never used.
inline void load_floats(const Attend& a, const BlockRows& at, int64_t g, const Workspace& r) {
    for (int64_t j = at.first; j < at.last; j++) {
        const bool is_new = j >= at.old;
        const int64_t row = at.row[j] * a.G + g;
        const void *k = is_new ? a.k : a.old_k, *v = is_new ? a.v : a.old_v;
        if (a.int8) {
            const int8_t *keys = static_cast<const int8_t*>(k) + row * a.D, *values = static_cast<const int8_t*>(v) + row * a.D;
            for (int64_t d = 0; d < a.D; d++) r.kf[d * KEYS + j] = keys[d], r.vf[j * r.D32 + d] = values[d];
        } else {
            const float* keys = static_cast<const float*>(k) + row * a.D;
            for (int64_t d = 0; d < a.D; d++) r.kf[d * KEYS + j] = keys[d];
            std::memcpy(r.vf + j * r.D32, static_cast<const float*>(v) + row * a.D, a.D * 4);
        }
        r.k_scale[j] = a.int8 ? (is_new ? a.k_scale : a.old_k_scale)[row] : 1.0f;
        r.v_scale[j] = a.int8 ? (is_new ? a.v_scale : a.old_v_scale)[row] : 1.0f;
    }
}

// s (R, 64) = q (R, D) K^T, each sum in the order of d.
template <int64_t R>
void float_scores(const float* const* q, const float* k, int64_t D, float* s) {
    F16 sum[R][4] = {};
    for (int64_t d = 0; d < D; d++)
        for (int i = 0; i < 4; i++) {
            const F16 key = load(k + d * KEYS + 16 * i);
            for (int64_t m = 0; m < R; m++) sum[m][i] += q[m][d] * key;
        }
    for (int64_t m = 0; m < R; m++)
        for (int i = 0; i < 4; i++) store(s + m * KEYS + 16 * i, sum[m][i]);
}

// o (R, D32) += p (R, 64) V over the keys first..last, in their order.
template <int64_t R>
void float_values(const float* p, const float* v, int64_t D32, int64_t first, int64_t last, float* o) {
    for (int64_t d = 0; d < D32; d += 64) {
        F16 sum[R][4];
        for (int64_t m = 0; m < R; m++)
            for (int i = 0; i < 4; i++) sum[m][i] = load(o + m * D32 + d + 16 * i);
        for (int64_t j = first; j < last; j++)
            for (int i = 0; i < 4; i++) {
                const F16 value = load(v + j * D32 + d + 16 * i);
                for (int64_t m = 0; m < R; m++) sum[m][i] += p[m * KEYS + j] * value;
            }
        for (int64_t m = 0; m < R; m++)
            for (int i = 0; i < 4; i++) store(o + m * D32 + d + 16 * i, sum[m][i]);
    }
}

// Queries t0..t1 of sequence b for the heads of key head g; r.kf, r.vf, r.s (as p too) and r.o of these rows are floats.
void attend_floats(const Attend& a, const Workspace& r, int64_t b, int64_t t0, int64_t t1, int64_t g) {
    const int64_t R = a.H / a.G, rows = (t1 - t0) * R, start = a.start[b], end = start + t1;
    const int64_t begin = first_key(a, b, start + t0), query0 = first_query(a, b) + t0;
    const float scale = 1.0f / __builtin_sqrtf(float(a.D));
    auto query = [&](int64_t m) { return ((query0 + m / R) * a.H + g * R + m % R) * a.D; };
    std::memset(r.o, 0, rows * r.D32 * 4);
    std::memset(r.sum, 0, rows * 64);
    for (int64_t m = 0; m < rows; m++) r.max[m] = -3.0e38f;
    BlockRows at;
    for (int64_t block = begin / KEYS * KEYS; block < end; block += KEYS) {
        find_block(a, b, block, begin, end, at);
        load_floats(a, at, g, r);
        const float* q[FEW];
        for (int64_t m = 0, n; m < rows; m += n) {
            n = rows - m < FEW ? 1 : FEW;
            for (int64_t i = 0; i < n; i++) q[i] = static_cast<const float*>(a.q) + query(m + i);
            n == 1 ? float_scores<1>(q, r.kf, a.D, r.s + m * KEYS) : float_scores<FEW>(q, r.kf, a.D, r.s + m * KEYS);
        }
        for (int64_t p = start + t0, m = 0; p < end; p++) {
            const int64_t first = std::max(int64_t(0), first_key(a, b, p) - block), last = std::min(KEYS, p + 1 - block);
            for (const int64_t stop = m + R; m < stop; m++) softmax_block(r, r.s, m, first, last, scale);
        }
        for (int64_t m = 0, n; m < rows; m += n) {
            n = rows - m < FEW ? 1 : FEW;
            const auto add = n == 1 ? float_values<1> : float_values<FEW>;
            add(r.s + m * KEYS, r.vf, r.D32, at.first, at.last, r.o + m * r.D32);
        }
    }
    for (int64_t m = 0; m < rows; m++) {
        const F16 sum = broadcast(reduce_sum(load(r.sum + 16 * m)));
        float* out = static_cast<float*>(a.out) + query(m);
        for (int64_t d = 0; d < a.D; d += 16) store(out + d, load(r.o + m * r.D32 + d) / sum, a.D - d);
    }
}

}  // namespace
