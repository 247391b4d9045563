// Rounding of weights: the search for scales of Q4_K and Q6_K, and error feedback within a block of columns.
// Their twins are in quantization/rounding.py, which explains the search, and quantization/feedback.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "threads.h"
#include "vectors.h"

struct RoundCall {
    const void* x;           // (N, K)
    const float* importance; // (K,), or null
    uint8_t* q;              // (N, B, 256)
    uint8_t* scales;         // (N, B, 12 or 16)
    uint16_t* d;             // float16 (N, B, 2 or 1)
    int64_t N, K;
    int q6, bf16, threads;
};

struct FeedbackCall {
    float* target;            // (N, C), the weights and the feedback of all later columns; overwritten
    float* w;                 // (N, C), the weights; replaced by their errors
    const float* factor;      // (C, C), its strictly lower triangular part
    const float* step;        // (N, C)
    float* q;                 // (N, C)
    int64_t N, C;
    float low, high;
    int threads;
};

namespace {

constexpr float INFINITE = __builtin_inff();

inline F16 minimum(F16 a, F16 b) { return select(a < b, a, b); }
inline F16 clamp(F16 v, float low, float high) { return minimum(maximum(v, broadcast(low)), broadcast(high)); }
inline F16 nearest(F16 v) {  // ties to even, for |v| < 2^22
    const F16 magic = broadcast(12582912.0f);
    return (v + magic) - magic;
}
inline F16 inverse(F16 v) { return select(v == F16{}, F16{}, broadcast(1) / v); }

uint16_t to_half(float f) {  // round to nearest even
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7e00;
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (bits < 0x38800000) {  // subnormal: adding 0.5 aligns the units of both
        std::memcpy(&f, &bits, 4);
        f += 0.5f;
        std::memcpy(&bits, &f, 4);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

// Sixteen groups of S values, a group in each lane.
template <int S>
struct Groups {
    F16 x[S], w[S], wx[S], q[S];
    F16 sum_w, sum_x, sum_xx;
    bool weighted;

    struct Sums {
        F16 q, qq, xq;
    };

    // The order of a sum: four sums of every fourth value, then of these.
    template <class F>
    static F16 sum(F value) {
        F16 part[4];
        for (int j = 0; j < 4; j++) {
            part[j] = value(j);
            for (int i = j + 4; i < S; i += 4) part[j] += value(i);
        }
        return (part[0] + part[2]) + (part[1] + part[3]);
    }
    void prepare() {
        if (!weighted) {
            for (int i = 0; i < S; i++) wx[i] = x[i];
            sum_w = broadcast(S);
        } else {
            for (int i = 0; i < S; i++) wx[i] = x[i] * w[i];
            sum_w = sum([&](int i) { return w[i]; });
        }
        sum_x = sum([&](int i) { return wx[i]; });
        sum_xx = sum([&](int i) { return wx[i] * x[i]; });
    }
    void codes(F16 scale, F16 offset, float low, float high) {
        const F16 factor = inverse(scale);
        for (int i = 0; i < S; i++) q[i] = nearest(clamp((x[i] + offset) * factor, low, high));
    }
    Sums sums() const {
        Sums s;
        s.xq = sum([&](int i) { return wx[i] * q[i]; });
        if (!weighted) {
            s.q = sum([&](int i) { return q[i]; });
            s.qq = sum([&](int i) { return q[i] * q[i]; });
        } else {
            s.q = sum([&](int i) { return w[i] * q[i]; });
            s.qq = sum([&](int i) { return w[i] * q[i] * q[i]; });
        }
        return s;
    }
    F16 error(F16 scale, F16 offset, const Sums& s) const {
        const F16 square = scale * (scale * s.qq + 2 * (offset * s.q - s.xq));
        return square + offset * (sum_w * offset - 2 * sum_x) + sum_xx;
    }
};

// The float16 nearest to each lane's value, and its bits.
inline F16 halved(F16 v, uint16_t* bits) {
    for (int i = 0; i < 16; i++) {
        bits[i] = to_half(v[i]);
        lanes(v)[i] = from_half(bits[i]);
    }
    return v;
}
// The largest of each eight lanes, in all of them.
inline F16 largest_of_eight(F16 v) {
    for (int half = 0; half < 16; half += 8) {
        float most = v[half];
        for (int i = 1; i < 8; i++) most = std::max(most, v[half + i]);
        for (int i = 0; i < 8; i++) lanes(v)[half + i] = most;
    }
    return v;
}

// Two blocks of Q4_K: 12 bytes of scales and two float16 scales each.
inline void round_q4_k(Groups<32>& g, uint8_t* scales, uint16_t* d_bits) {
    F16 low{}, high = g.x[0];
    for (int i = 0; i < 32; i++) low = minimum(low, g.x[i]), high = maximum(high, g.x[i]);
    F16 scale = (high - low) / 15, offset = low, best = broadcast(INFINITE);
    for (int i = 0; i < 13; i++) {
        g.codes((high - low) / float(14 + 2.4 * i / 12), -low, 0, 15);
        const auto s = g.sums();
        const F16 factor = inverse(g.sum_w * s.qq - s.q * s.q);
        F16 new_scale = (g.sum_w * s.xq - g.sum_x * s.q) * factor;
        F16 new_offset = (s.qq * g.sum_x - s.q * s.xq) * factor;
        new_scale = select(new_offset > 0, s.xq * inverse(s.qq), new_scale);
        new_offset = minimum(new_offset, F16{});
        const F16 error = g.error(new_scale, new_offset, s);
        const auto closer = (error < best) & (factor > 0) & (new_scale > 0);
        scale = select(closer, new_scale, scale);
        offset = select(closer, new_offset, offset);
        best = select(closer, error, best);
    }
    uint16_t d_half[16], m_half[16];
    const F16 d = halved(largest_of_eight(scale) / 63, d_half), m = halved(largest_of_eight(-offset) / 63, m_half);
    const F16 first = nearest(clamp(scale * inverse(d), 0, 63)), t = nearest(clamp(-offset * inverse(m), 0, 63));
    F16 best_s = first, best_t = t;
    best = broadcast(INFINITE);
    for (float change : {0.0f, -1.0f, 1.0f}) {
        const F16 s = clamp(first + change, 0, 63);
        g.codes(d * s, m * t, 0, 15);
        const auto sums = g.sums();
        const F16 fitted = nearest(clamp((d * s * sums.q - g.sum_x) * inverse(g.sum_w * m), 0, 63));
        const F16 error = g.error(d * s, -m * fitted, sums);
        const auto closer = error < best;
        best_s = select(closer, s, best_s);
        best_t = select(closer, fitted, best_t);
        best = select(closer, error, best);
    }
    g.codes(d * best_s, m * best_t, 0, 15);
    for (int half = 0; half < 2; half++, scales += 12) {
        uint8_t s[8], t8[8];
        for (int i = 0; i < 8; i++) s[i] = uint8_t(best_s[half * 8 + i]), t8[i] = uint8_t(best_t[half * 8 + i]);
        for (int i = 0; i < 4; i++) {  // as in block_formats.group_scales
            scales[i] = uint8_t(s[i] | s[i + 4] >> 4 << 6);
            scales[i + 4] = uint8_t(t8[i] | t8[i + 4] >> 4 << 6);
            scales[i + 8] = uint8_t((s[i + 4] & 15) | t8[i + 4] << 4);
        }
        d_bits[half * 2] = d_half[half * 8];
        d_bits[half * 2 + 1] = m_half[half * 8];
    }
}

// A block of Q6_K: 16 bytes of scales, a float16 scale.
inline void round_q6_k(Groups<16>& g, uint8_t* scales, uint16_t* d_bits) {
    F16 low = g.x[0], high = g.x[0];
    for (int i = 1; i < 16; i++) low = minimum(low, g.x[i]), high = maximum(high, g.x[i]);
    const F16 largest = select(high < -low, low, high);
    F16 scale = largest / -32, best = broadcast(-1);
    for (int i = 0; i < 9; i++) {
        g.codes(largest / -float(31 + 2.0 * i / 8), F16{}, -32, 31);
        const auto s = g.sums();
        const F16 fitted = s.xq * inverse(s.qq), gain = fitted * s.xq;
        const auto closer = gain > best;
        scale = select(closer, fitted, scale);
        best = select(closer, gain, best);
    }
    float outer = scale[0];
    for (int i = 1; i < 16; i++)
        if (std::abs(scale[i]) > std::abs(outer)) outer = scale[i];
    *d_bits = to_half(outer / -128);
    const float d = from_half(*d_bits);
    const F16 first = nearest(clamp(scale * inverse(broadcast(d)), -128, 127));
    F16 best_s = first;
    best = broadcast(INFINITE);
    for (float change : {0.0f, -1.0f, 1.0f}) {
        const F16 s = clamp(first + change, -128, 127), step = d * s;
        g.codes(step, F16{}, -32, 31);
        const F16 error = g.error(step, F16{}, g.sums());
        const auto closer = error < best;
        best_s = select(closer, s, best_s);
        best = select(closer, error, best);
    }
    g.codes(d * best_s, F16{}, -32, 31);
    for (int i = 0; i < 16; i++) scales[i] = uint8_t(int8_t(best_s[i]));
}

// S values of a group, `count` blocks of 256 values at once: sixteen groups.
template <class T, int S>
void round_searched(const RoundCall& c) {
    constexpr int count = 16 * S / 256, each = 16 / count;
    constexpr int bytes = S == 32 ? 12 : 16, floats = S == 32 ? 2 : 1;
    const int64_t blocks = (c.K + 255) / 256, total = c.N * blocks;
    parallel(c.threads, [&](int thread, int threads) {
        const Span span = partition((total + count - 1) / count, thread, threads);
        Groups<S> g;
        g.weighted = c.importance != nullptr;
        for (int64_t first = span.begin * count; first < std::min(span.end * count, total); first += count) {
            bool finite[count];
            for (int b = 0; b < count; b++) {
                const int64_t block = first + b, row = block / blocks, begin = block % blocks * 256;
                finite[b] = true;
                for (int lane = 0; lane < each; lane++)
                    for (int i = 0; i < S; i++) {
                        const int64_t k = begin + lane * S + i;
                        const bool inside = block < total && k < c.K;
                        const float v = inside ? T::load(static_cast<const typename T::Store*>(c.x), row * c.K + k) : 0;
                        finite[b] &= v - v == 0;
                        lanes(g.x[i])[b * each + lane] = v;
                        if (g.weighted) lanes(g.w[i])[b * each + lane] = inside ? c.importance[k] : 0;
                    }
            }
            g.prepare();
            uint8_t scales[count * bytes];
            uint16_t d[count * floats];
            if constexpr (S == 32)
                round_q4_k(g, scales, d);
            else
                round_q6_k(g, scales, d);
            for (int b = 0; b < count && first + b < total; b++) {
                std::memcpy(c.scales + (first + b) * bytes, scales + b * bytes, bytes);
                if (!finite[b]) d[b * floats] = 0x7e00;  // NaN: the caller refuses it
                std::memcpy(c.d + (first + b) * floats, d + b * floats, floats * 2);
                for (int lane = 0; lane < each; lane++)
                    for (int i = 0; i < S; i++)
                        c.q[(first + b) * 256 + lane * S + i] = uint8_t(g.q[i][b * each + lane] + (S == 16 ? 32 : 0));
            }
        }
    });
}

// Round the columns of a block from the last to the first; each error is added to the columns before it.
void feedback(const FeedbackCall& c) {
    parallel(c.threads, [&](int thread, int threads) {
        const Span rows = partition(c.N, thread, threads);
        for (int64_t n = rows.begin; n < rows.end; n++) {
            float *target = c.target + n * c.C, *w = c.w + n * c.C, *q = c.q + n * c.C;
            const float* step = c.step + n * c.C;
            for (int64_t i = c.C - 1; i >= 0; i--) {
                const float s = step[i], value = s == 0 ? 0 : target[i] / s;
                q[i] = std::min(std::max(__builtin_rintf(value), c.low), c.high);
                w[i] -= q[i] * s;
                const float error = w[i];
                const float* factor = c.factor + i * c.C;
                for (int64_t j = 0; j < i; j++) target[j] += error * factor[j];
            }
        }
    });
}

}  // namespace
