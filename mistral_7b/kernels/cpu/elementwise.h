// What lies between the products: norm, gate, sum and rotation.

#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.h"
#include "vectors.h"

namespace {

// y = cast(x / sqrt(mean(x^2) + eps)) * weight, a row at a time; sums in one order whatever the batch.
template <class T>
void rms_norm(const typename T::Store* x, const typename T::Store* weight, int64_t M, int64_t D, float eps, int threads, typename T::Store* y) {
    parallel(M * D < 1 << 16 ? 1 : threads, [&](int t, int n) {
        const Span mine = share(M, t, n);
        for (int64_t m = mine.begin; m < mine.end; m++) {
            const auto* row = x + m * D;
            auto* out = y + m * D;
            F16 sum[4] = {};
            for (int64_t d = 0; d < D; d += 64)
                for (int u = 0; u < 4 && d + 16 * u < D; u++) {
                    F16 v = take(row + d + 16 * u, D - d - 16 * u);
                    sum[u] += v * v;
                }
            const float mean = total((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(D);
            const F16 r = all(1.0f / __builtin_sqrtf(mean + eps));
            for (int64_t d = 0; d < D; d += 16) {
                typename T::Store cast[16];
                give(cast, take(row + d, D - d) * r);
                give(out + d, take(cast) * take(weight + d, D - d), D - d);
            }
        }
    });
}

// silu(gate) * up, each rounded to its type as PyTorch does.
template <class T>
void silu_mul(const typename T::Store* gate, const typename T::Store* up, int64_t n, int threads, typename T::Store* y) {
    const int64_t lines = (n + 15) / 16;
    parallel(n < 1 << 15 ? 1 : threads, [&](int t, int of) {
        const Span mine = share(lines, t, of);
        for (int64_t i = mine.begin * 16; i < std::min(n, mine.end * 16); i += 16) {
            F16 g = take(gate + i, n - i);
            typename T::Store cast[16];
            give(cast, g / (1.0f + exponential(-g)));
            give(y + i, take(cast) * take(up + i, n - i), n - i);
        }
    });
}

// a + b, rounded to its type.
template <class T>
void add(const typename T::Store* a, const typename T::Store* b, int64_t n, int threads, typename T::Store* y) {
    const int64_t lines = (n + 15) / 16;
    parallel(n < 1 << 16 ? 1 : threads, [&](int t, int of) {
        const Span mine = share(lines, t, of);
        for (int64_t i = mine.begin * 16; i < std::min(n, mine.end * 16); i += 16) give(y + i, take(a + i, n - i) + take(b + i, n - i), n - i);
    });
}

// Neighbours (2i, 2i + 1) of each head turned by the angle whose cos and sin stand at its row: (M, heads, D).
template <class T>
void rotate(const typename T::Store* x, const float* cos, const float* sin, int64_t M, int64_t angles, int64_t heads, int64_t D, int threads, typename T::Store* y) {
    parallel(M * heads * D < 1 << 16 ? 1 : threads, [&](int t, int n) {
        const Span mine = share(M, t, n);
        for (int64_t m = mine.begin; m < mine.end; m++) {
            const float *c = cos + m % angles * (D / 2), *s = sin + m % angles * (D / 2);
            for (int64_t h = 0; h < heads; h++) {
                const auto* in = x + (m * heads + h) * D;
                auto* out = y + (m * heads + h) * D;
                for (int64_t i = 0; i < D / 2; i++) {
                    const float even = T::get(in, 2 * i), odd = T::get(in, 2 * i + 1);
                    T::put(out, 2 * i, even * c[i] - odd * s[i]);
                    T::put(out, 2 * i + 1, even * s[i] + odd * c[i]);
                }
            }
        }
    });
}

}  // namespace
