// A transformer block on either side of its attention, and all blocks of a model in one call.

#pragma once

#include <cstdint>

#include "attention.h"
#include "elementwise.h"
#include "products.h"

namespace {

// Everything of a transformer block on either side of attention, in two calls: between calls of its parts, one by
// one, the interpreter would take a tenth of a step of decoding, its own memory being cold after each weight.
struct Block {
    Weights wq, wk, wv, wo, w1, w2, w3;
    const void *attention_norm, *ffn_norm;
    int64_t dim, head_dim;
    float eps;
};

template <class T>
typename T::Store* room(int which, int64_t n) {
    static thread_local Scratch<typename T::Store> rooms[4];
    return rooms[which].get(n);
}

// q, k, v = rotated projections of the normed x (M, D).
template <class T>
void project(const Block& b, const void* x, int64_t M, const float* cos, const float* sin, int64_t angles, int threads, void* q, void* k, void* v) {
    using S = typename T::Store;
    S *h = room<T>(0, M * b.dim), *heads[] = {static_cast<S*>(q), static_cast<S*>(k)};
    rms_norm<T>(static_cast<const S*>(x), static_cast<const S*>(b.attention_norm), M, b.dim, b.eps, threads, h);
    linears<T>(h, M, b.dim, {&b.wq, &b.wk, &b.wv}, threads, {q, k, v});
    for (int i = 0; i < 2; i++)
        rotate<T>(heads[i], cos, sin, M, angles, (i ? b.wk : b.wq).N / b.head_dim, b.head_dim, threads, heads[i]);
}

// y = z + feed_forward(norm(z)), z = x + wo(attended).
template <class T>
void finish_block(const Block& b, const void* x, const void* attended, int64_t M, int threads, void* y) {
    using S = typename T::Store;
    S *h = room<T>(0, M * b.dim), *gate = room<T>(1, M * b.w1.N), *up = room<T>(2, M * b.w1.N), *z = room<T>(3, M * b.dim);
    linears<T>(attended, M, b.wq.N, {&b.wo}, threads, {h});
    add<T>(static_cast<const S*>(x), h, M * b.dim, threads, z);
    rms_norm<T>(z, static_cast<const S*>(b.ffn_norm), M, b.dim, b.eps, threads, h);
    linears<T>(h, M, b.dim, {&b.w1, &b.w3}, threads, {gate, up});
    silu_mul<T>(gate, up, M * b.w1.N, threads, gate);
    linears<T>(gate, M, b.w1.N, {&b.w2}, threads, {h});
    add<T>(z, h, M * b.dim, threads, static_cast<S*>(y));
}

// Keys or values (rows, D) of heads to int8, each with its own scale.
void quantise_heads(const uint16_t* x, int64_t rows, int64_t D, int threads, int8_t* q, float* scale) {
    parallel(rows * D < 1 << 16 ? 1 : threads, [&](int t, int n) {
        const Span mine = share(rows, t, n);
        int32_t sum;
        for (int64_t i = mine.begin; i < mine.end; i++) quantise_row<BF16>({1, D, D, D, D, q + i * D, scale + i, &sum}, 0, x + i * D);
    });
}

// All blocks of a model over a ring or pages: `a` says where these lie and how far they are filled, and keeps what is new.
void run_layers(const Block* blocks, int64_t n_layers, void* const* old, Attend a, uint16_t* x, const float* cos, const float* sin, int64_t angles, int threads) {
    static thread_local Scratch<uint16_t> qkv_of;
    static thread_local Scratch<int8_t> codes_of;
    static thread_local Scratch<float> scales_of;
    const int64_t M = a.N, nq = M * a.H * a.D, nk = M * a.G * a.D;
    uint16_t *q = qkv_of.get(2 * nq + 2 * nk), *k = q + nq, *v = k + nk, *out = v + nk;
    int8_t* codes = codes_of.get(a.int8 ? 2 * nk : 1);
    float* scales = scales_of.get(a.int8 ? 2 * M * a.G : 1);
    a.q = q, a.k = k, a.v = v, a.out = out, a.keep = true;
    const Plan plan = make_plan(a, threads);
    for (int64_t n = 0; n < n_layers; n++) {
        project<BF16>(blocks[n], x, M, cos, sin, angles, threads, q, k, v);
        a.old_k = *old++, a.old_v = *old++;
        if (a.int8) {
            a.old_ks = static_cast<float*>(*old++), a.old_vs = static_cast<float*>(*old++);
            quantise_heads(k, M * a.G, a.D, threads, codes, scales);
            quantise_heads(v, M * a.G, a.D, threads, codes + nk, scales + M * a.G);
            a.k = codes, a.v = codes + nk, a.ks = scales, a.vs = scales + M * a.G;
        }
        attend(a, plan, threads);
        finish_block<BF16>(blocks[n], x, out, M, threads, x);
    }
}

}  // namespace
