// Attention of float32 queries over one block of keys at a time, by the order of sums of attention.h, on vectors alone.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "keys.h"
#include "scores.h"
#include "vectors.h"

namespace {

// Loads keys (D, 64) and values (64, D32) of one head, with their scales. Those of missing keys are never used.
inline void load_floats(const Attend& a, const BlockRows& at, int64_t g, const Workspace& r) {
    float* line = reinterpret_cast<float*>(r.line);
    for (int64_t j = at.first; j < at.last; j++) {
        const bool is_new = j >= at.old;
        const int64_t row = at.row[j] * a.G + g;
        const void *k = is_new ? a.k : a.old_k, *v = is_new ? a.v : a.old_v;
        if (a.int8) {
            const int8_t *keys = static_cast<const int8_t*>(k) + row * a.D, *values = static_cast<const int8_t*>(v) + row * a.D;
            for (int64_t d = 0; d < a.D; d++) line[j * r.D32 + d] = keys[d], r.vf[j * r.D32 + d] = values[d];
        } else {
            std::memcpy(line + j * r.D32, static_cast<const float*>(k) + row * a.D, a.D * 4);
            std::memcpy(r.vf + j * r.D32, static_cast<const float*>(v) + row * a.D, a.D * 4);
        }
        r.k_scale[j] = a.int8 ? (is_new ? a.k_scale : a.old_k_scale)[row] : 1.0f;
        r.v_scale[j] = a.int8 ? (is_new ? a.v_scale : a.old_v_scale)[row] : 1.0f;
    }
    pack_keys(line, r.D32, r.kf);
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
        some_rows(rows, [&](int64_t m, auto n) {
            const float* q[n];
            for (int64_t i = 0; i < n; i++) q[i] = static_cast<const float*>(a.q) + query(m + i);
            score_rows<n>(q, r.kf, a.D, r.s + m * KEYS);
        });
        for (int64_t p = start + t0, m = 0; p < end; p++) {
            const int64_t first = std::max(int64_t(0), first_key(a, b, p) - block), last = std::min(KEYS, p + 1 - block);
            for (const int64_t stop = m + R; m < stop; m++) softmax_block(r, r.s, m, first, last, scale);
        }
        some_rows(rows, [&](int64_t m, auto n) { value_rows<n>(r.s + m * KEYS, r.vf, r.D32, at.first, at.last, r.o + m * r.D32); });
    }
    for (int64_t m = 0; m < rows; m++) {
        const F16 sum = broadcast(reduce_sum(load(r.sum + 16 * m)));
        float* out = static_cast<float*>(a.out) + query(m);
        for (int64_t d = 0; d < a.D; d += 16) store(out + d, load(r.o + m * r.D32 + d) / sum, a.D - d);
    }
}

}  // namespace
