// RMSNorm and SwiGLU's gate, each with its backward pass; addition and rotary embedding.

#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.h"
#include "vectors.h"

namespace {

struct RMSNormCall {
    const void *x, *weight;  // (M, D), (D,)
    void* out;               // (M, D)
    int64_t M, D;
    float eps;
    int bf16, threads;
};

struct RMSNormBackCall {
    const void *x, *weight, *grad;  // (M, D), (D,), (M, D)
    void* out;                      // (M, D)
    int64_t M, D;
    float eps;
    int bf16, threads;
};

struct SiluMulCall {
    const void *gate, *up;  // (n,)
    void* out;
    int64_t n;
    int bf16, threads;
};

struct SiluMulBackCall {
    const void *gate, *up, *grad;  // (n,)
    void *d_gate, *d_up;
    int64_t n;
    int bf16, threads;
};

struct RotateCall {
    const void* x;           // (M, heads, D)
    const float *cos, *sin;  // (angles, D / 2), repeated if M is a multiple threads `angles`
    void* out;
    int64_t M, angles, heads, D;
    int bf16, threads;
};

// out = cast(x / sqrt(mean(x^2) + eps)) * weight, per row; the order of sums does not depend on the batch.
template <class T>
void rms_norm(const RMSNormCall& c) {
    using S = typename T::Store;
    const int64_t D = c.D;
    const S *x = static_cast<const S*>(c.x), *weight = static_cast<const S*>(c.weight);
    S* y = static_cast<S*>(c.out);
    parallel(c.M * D < 1 << 16 ? 1 : c.threads, [&](int t, int n) {
        const Span range = partition(c.M, t, n);
        for (int64_t m = range.begin; m < range.end; m++) {
            const auto* row = x + m * D;
            auto* out = y + m * D;
            F16 sum[4] = {};
            for (int64_t d = 0; d < D; d += 64)
                for (int u = 0; u < 4 && d + 16 * u < D; u++) {
                    F16 v = load(row + d + 16 * u, D - d - 16 * u);
                    sum[u] += v * v;
                }
            const float mean = reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(D);
            const F16 r = broadcast(1.0f / __builtin_sqrtf(mean + c.eps));
            for (int64_t d = 0; d < D; d += 16) {
                S cast[16];
                store(cast, load(row + d, D - d) * r);
                store(out + d, load(cast) * load(weight + d, D - d), D - d);
            }
        }
    });
}

// The gradient of x: with r = 1 / sqrt(mean(x^2) + eps) and g = grad * weight, r (g - x r^2 mean(g x)).
template <class T>
void rms_norm_back(const RMSNormBackCall& c) {
    using S = typename T::Store;
    const int64_t D = c.D;
    const S *xs = static_cast<const S*>(c.x), *weight = static_cast<const S*>(c.weight), *grads = static_cast<const S*>(c.grad);
    S* outs = static_cast<S*>(c.out);
    parallel(c.M * D < 1 << 16 ? 1 : c.threads, [&](int t, int n) {
        const Span range = partition(c.M, t, n);
        for (int64_t m = range.begin; m < range.end; m++) {
            const S *x = xs + m * D, *grad = grads + m * D;
            F16 squares = {}, products = {};
            for (int64_t d = 0; d < D; d += 16) {
                const F16 v = load(x + d, D - d);
                squares += v * v;
                products += v * (load(grad + d, D - d) * load(weight + d, D - d));
            }
            const float mean = reduce_sum(squares) / float(D);
            const float r = 1.0f / __builtin_sqrtf(mean + c.eps);
            const F16 scale = broadcast(r), along = broadcast(reduce_sum(products) / float(D) * r * r);
            for (int64_t d = 0; d < D; d += 16) {
                const F16 g = load(grad + d, D - d) * load(weight + d, D - d);
                store(outs + m * D + d, scale * (g - load(x + d, D - d) * along), D - d);
            }
        }
    });
}

// silu(gate) * up, each rounded to its type as in PyTorch.
template <class T>
void silu_mul(const SiluMulCall& c) {
    using S = typename T::Store;
    const S *gate = static_cast<const S*>(c.gate), *up = static_cast<const S*>(c.up);
    S* y = static_cast<S*>(c.out);
    const int64_t n = c.n, vectors = (n + 15) / 16;
    parallel(n < 1 << 15 ? 1 : c.threads, [&](int t, int threads) {
        const Span range = partition(vectors, t, threads);
        for (int64_t i = range.begin * 16; i < std::min(n, range.end * 16); i += 16) {
            F16 g = load(gate + i, n - i);
            S cast[16];
            store(cast, g / (1.0f + exponential(-g)));
            store(y + i, load(cast) * load(up + i, n - i), n - i);
        }
    });
}

// The gradients of gate and up: with s = 1 / (1 + e^-gate), grad up s (1 + gate (1 - s)) and grad gate s.
template <class T>
void silu_mul_back(const SiluMulBackCall& c) {
    using S = typename T::Store;
    const S *gate = static_cast<const S*>(c.gate), *up = static_cast<const S*>(c.up), *grad = static_cast<const S*>(c.grad);
    S *d_gate = static_cast<S*>(c.d_gate), *d_up = static_cast<S*>(c.d_up);
    const int64_t n = c.n, vectors = (n + 15) / 16;
    parallel(n < 1 << 15 ? 1 : c.threads, [&](int t, int threads) {
        const Span range = partition(vectors, t, threads);
        for (int64_t i = range.begin * 16; i < std::min(n, range.end * 16); i += 16) {
            const F16 g = load(gate + i, n - i), dy = load(grad + i, n - i);
            const F16 s = 1.0f / (1.0f + exponential(-g));
            store(d_gate + i, dy * load(up + i, n - i) * (s * (1.0f + g * (1.0f - s))), n - i);
            store(d_up + i, dy * (g * s), n - i);
        }
    });
}

// a + b, rounded to its type.
template <class T>
void add(const typename T::Store* a, const typename T::Store* b, int64_t n, int threads, typename T::Store* y) {
    const int64_t vectors = (n + 15) / 16;
    parallel(n < 1 << 16 ? 1 : threads, [&](int t, int threads) {
        const Span range = partition(vectors, t, threads);
        for (int64_t i = range.begin * 16; i < std::min(n, range.end * 16); i += 16) store(y + i, load(a + i, n - i) + load(b + i, n - i), n - i);
    });
}

// Rotates adjacent pairs (2i, 2i + 1) of each head of x (M, heads, D) by the angles of its row.
template <class T>
void rotate(const RotateCall& c) {
    using S = typename T::Store;
    const int64_t heads = c.heads, D = c.D;
    parallel(c.M * heads * D < 1 << 16 ? 1 : c.threads, [&](int t, int n) {
        const Span range = partition(c.M, t, n);
        for (int64_t m = range.begin; m < range.end; m++) {
            const float *cos = c.cos + m % c.angles * (D / 2), *sin = c.sin + m % c.angles * (D / 2);
            for (int64_t h = 0; h < heads; h++) {
                const S* in = static_cast<const S*>(c.x) + (m * heads + h) * D;
                S* out = static_cast<S*>(c.out) + (m * heads + h) * D;
                for (int64_t i = 0; i < D / 2; i++) {
                    const float even = T::load(in, 2 * i), odd = T::load(in, 2 * i + 1);
                    T::store(out, 2 * i, even * cos[i] - odd * sin[i]);
                    T::store(out, 2 * i + 1, even * sin[i] + odd * cos[i]);
                }
            }
        }
    });
}

}  // namespace
