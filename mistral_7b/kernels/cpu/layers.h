// A transformer block before and after its attention, and all blocks of a model in one call.

#pragma once

#include <cstdint>

#include "attention.h"
#include "elementwise.h"
#include "products.h"

namespace {

// A transformer block is two calls, before and after attention. With one call per operation, the Python interpreter
// would take a tenth of a decode step, since each weight evicts its memory from the caches.
struct Block {
    Weights wq, wk, wv, wo, w1, w2, w3;
    const void *attention_norm, *ffn_norm;
    int64_t dim, head_dim;
    float eps;
};

template <class T>
typename T::Store* workspace(int which, int64_t n) {
    static thread_local Scratch<typename T::Store> workspaces[4];
    return workspaces[which].get(n);
}

struct ProjectCall {
    const Block* block;
    const void* x;           // (M, dim)
    const float *cos, *sin;  // (angles, head_dim / 2), repeated if M is a multiple of `angles`
    void *q, *k, *v;         // (M, heads, head_dim)
    int64_t M, angles;
    int bf16, threads;
};

struct FinishBlockCall {
    const Block* block;
    const void *x, *attended;  // (M, dim), (M, heads, head_dim)
    void* out;                 // (M, dim)
    int64_t M;
    int bf16, threads;
};

// All blocks, with a cache in a ring or pages. `attend` describes the cache; its q, k, v and out are set here.
struct LayersCall {
    Attend attend;
    const Block* blocks;
    void* const* entries;    // per layer the cached keys and values, for int8 also their scales
    void* x;                 // (N, dim) bfloat16, in place
    const float *cos, *sin;  // as in ProjectCall
    int64_t layers, angles;
};

// q, k, v = projections of the normalized x (M, dim); q and k are rotated.
template <class T>
void project(const ProjectCall& c) {
    const Block& b = *c.block;
    auto* h = workspace<T>(0, c.M * b.dim);
    rms_norm<T>({c.x, b.attention_norm, h, c.M, b.dim, b.eps, c.bf16, c.threads});
    linears<T>(h, c.M, b.dim, {&b.wq, &b.wk, &b.wv}, c.threads, {c.q, c.k, c.v});
    const int64_t D = b.head_dim;
    rotate<T>({c.q, c.cos, c.sin, c.q, c.M, c.angles, b.wq.N / D, D, c.bf16, c.threads});
    rotate<T>({c.k, c.cos, c.sin, c.k, c.M, c.angles, b.wk.N / D, D, c.bf16, c.threads});
}

// out = z + feed_forward(norm(z)), z = x + wo(attended).
template <class T>
void finish_block(const FinishBlockCall& c) {
    using S = typename T::Store;
    const Block& b = *c.block;
    const int64_t M = c.M;
    S *h = workspace<T>(0, M * b.dim), *gate = workspace<T>(1, M * b.w1.N), *up = workspace<T>(2, M * b.w1.N), *z = workspace<T>(3, M * b.dim);
    linears<T>(c.attended, M, b.wq.N, {&b.wo}, c.threads, {h});
    add<T>(static_cast<const S*>(c.x), h, M * b.dim, c.threads, z);
    rms_norm<T>({z, b.ffn_norm, h, M, b.dim, b.eps, c.bf16, c.threads});
    linears<T>(h, M, b.dim, {&b.w1, &b.w3}, c.threads, {gate, up});
    silu_mul<T>({gate, up, gate, M * b.w1.N, c.bf16, c.threads});
    linears<T>(gate, M, b.w1.N, {&b.w2}, c.threads, {h});
    add<T>(z, h, M * b.dim, c.threads, static_cast<S*>(c.out));
}

// Quantizes keys or values (rows, D) to int8, with a scale per head of each token.
void quantize_heads(const uint16_t* x, int64_t rows, int64_t D, int threads, int8_t* q, float* scale) {
    parallel(rows * D < 1 << 16 ? 1 : threads, [&](int t, int n) {
        const Span range = partition(rows, t, n);
        int32_t sum;
        for (int64_t i = range.begin; i < range.end; i++) quantize_row<BF16>({1, D, D, D, D, 1, q + i * D, scale + i, &sum, nullptr}, 0, x + i * D);
    });
}

void run_layers(const LayersCall& c) {
    static thread_local Scratch<uint16_t> qkv_scratch;
    static thread_local Scratch<int8_t> codes_scratch;
    static thread_local Scratch<float> scales_scratch;
    Attend a = c.attend;
    const int64_t M = a.N, nq = M * a.H * a.D, nk = M * a.G * a.D;
    uint16_t *q = qkv_scratch.get(2 * nq + 2 * nk), *k = q + nq, *v = k + nk, *out = v + nk;
    int8_t* codes = codes_scratch.get(a.int8 ? 2 * nk : 1);
    float* scales = scales_scratch.get(a.int8 ? 2 * M * a.G : 1);
    a.q = q, a.k = k, a.v = v, a.out = out, a.bf16 = 1, a.keep = 1;
    const Plan plan = make_plan(a);
    void* const* entry = c.entries;
    for (const Block* block = c.blocks; block != c.blocks + c.layers; block++) {
        project<BF16>({block, c.x, c.cos, c.sin, q, k, v, M, c.angles, 1, a.threads});
        a.old_k = *entry++, a.old_v = *entry++;
        if (a.int8) {
            a.old_k_scale = static_cast<float*>(*entry++), a.old_v_scale = static_cast<float*>(*entry++);
            quantize_heads(k, M * a.G, a.D, a.threads, codes, scales);
            quantize_heads(v, M * a.G, a.D, a.threads, codes + nk, scales + M * a.G);
            a.k = codes, a.v = codes + nk, a.k_scale = scales, a.v_scale = scales + M * a.G;
        }
        attend(a, plan);
        finish_block<BF16>({block, c.x, out, c.x, M, 1, a.threads});
    }
}

}  // namespace
