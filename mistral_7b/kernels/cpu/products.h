// y = x w8^T for one x and several weights, of any format and for any number of rows, with LoRA updates.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "few_rows.h"
#include "gguf_blocks.h"
#include "low_rank.h"
#include "tiles.h"

namespace {

struct LinearCall {
    const Weights* weight;
    const void* x;  // (M, K)
    void* out;      // (M, N)
    int64_t M, K;
    int bf16, threads;
};

// The same rows by several weights of one format. Their tiles are partitioned together, to synchronize only once.
template <class T>
void products(const Rows& r, const Weights* const* weights, int64_t n, int threads, void* const* outs) {
#if defined(WITH_AMX)
    if (r.M > FEW) {
        for (int64_t i = 0; i < n; i++) amx_linear<T>(r, *weights[i], threads, outs[i]);
        return;
    }
#endif
    int64_t all_tiles = 0;
    for (int64_t i = 0; i < n; i++) all_tiles += (weights[i]->N + 15) / 16;
    parallel(threads, [&](int t, int of) {
        const Span range = partition(all_tiles, t, of);
        int64_t first = 0;
        for (int64_t i = 0; i < n; i++) {
            const int64_t tiles = (weights[i]->N + 15) / 16;
            const Span part{std::max(range.begin - first, int64_t(0)), std::min(range.end - first, tiles)};
            if (part.begin < part.end) product_tiles<T>(r, *weights[i], part, outs[i]);
            first += tiles;
        }
    });
}

// One x (M, K) by several weights, with LoRA updates. Weights of one format share the quantized x and a parallel loop.
template <class T>
void linears(const void* x, int64_t M, int64_t K, std::initializer_list<const Weights*> weights, int threads, std::initializer_list<void*> outs) {
    const Weights* const* w = weights.begin();
    void* const* out = outs.begin();
    for (const auto* end = weights.end(); w != end;) {
        int64_t n = 1;
        while (w + n != end && w[n]->Kp == w[0]->Kp && w[n]->group == w[0]->group && w[n]->bits == w[0]->bits && !w[n]->d == !w[0]->d) n++;
        const int used_threads = M * w[0]->N * w[0]->Kp < 1 << 18 ? 1 : threads;  // waking other threads would take longer
        const Rows r = quantize<T>(x, M, K, w[0]->Kp, w[0]->d ? BLOCK : w[0]->Kp, w[0]->group, used_threads);
        if (w[0]->d)
            for (int64_t i = 0; i < n; i++) block_product<T>(r, *w[i], used_threads, out[i]);
        else
            products<T>(r, w, n, used_threads, out);
        w += n;
        out += n;
    }
    add_low_rank<T>(x, M, K, weights, threads, outs);
}

}  // namespace
