// y = x w8^T for one x and several weights, of any format and for any number of rows, with LoRA updates.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

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

// Whether the matrix unit multiplies this many rows.
inline bool on_tiles(int64_t M, const Format& f) {
#if defined(WITH_TILES)
    return M > MANY && on_tiles(f);
#else
    return false;
#endif
}

// The given tiles of out (M, N), in one thread.
template <int KIND, class T>
void kind_tiles(const Rows& r, const Weights& w, Span tiles, void* out) {
#if defined(WITH_TILES)
    if constexpr (on_tiles(format_of(KIND)))
        if (on_tiles(r.M, format_of(KIND))) return tile_rows<KIND, T>(r, w, tiles, out);
#endif
    for (int64_t tile = tiles.begin; tile < tiles.end; tile++) block_rows<KIND, T>(r, w, tile, out);
}

template <class T>
void product_tiles(const Rows& r, const Weights& w, Span tiles, void* out) {
    with_kind(w.kind, [&](auto kind) { kind_tiles<decltype(kind)::value, T>(r, w, tiles, out); });
}

// A part of a product that one thread computes without interruption, and its cost: the bytes of a tile of weights.
inline int64_t tile_bytes(const Weights& w) { return tile_bytes(format_of(w.kind), w.Kp); }

// The same rows by several weights. Their tiles are partitioned together, to synchronize only once.
template <class T>
void products(const Rows& r, const Weights* const* weights, int64_t n, int threads, void* const* outs) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; i++) total += (weights[i]->N + 15) / 16 * tile_bytes(*weights[i]);
    parallel(threads, [&](int t, int of) {
        const Span range = partition(total, t, of);
        int64_t first = 0;
        for (int64_t i = 0; i < n; i++) {
            const Weights& w = *weights[i];
            const int64_t tiles = (w.N + 15) / 16, size = tile_bytes(w);
            // the tiles that begin in the range
            const auto tile_at = [&](int64_t byte) { return std::clamp((byte - first + size - 1) / size, int64_t(0), tiles); };
            const Span part{range.begin < first ? 0 : tile_at(range.begin), range.end < first ? 0 : tile_at(range.end)};
            if (part.begin < part.end) product_tiles<T>(r, w, part, outs[i]);
            first += tiles * size;
        }
    });
}

// Whether two weights can share the quantized x: scales of the same inputs, rows in the same layout.
inline bool share_rows(int64_t M, const Weights& a, const Weights& b) {
    const Format f = format_of(a.kind), g = format_of(b.kind);
    return a.Kp == b.Kp && f.block == g.block && on_tiles(M, f) == on_tiles(M, g);
}

// One x (M, K) by several weights, with LoRA updates. Weights that share the quantized x share a parallel loop.
template <class T>
void linears(const void* x, int64_t M, int64_t K, std::initializer_list<const Weights*> weights, int threads, std::initializer_list<void*> outs) {
    const Weights* const* w = weights.begin();
    void* const* out = outs.begin();
    for (const auto* end = weights.end(); w != end;) {
        int64_t n = 1;
        while (w + n != end && share_rows(M, *w[0], *w[n])) n++;
        const int used_threads = M * w[0]->N * w[0]->Kp < 1 << 18 ? 1 : threads;  // waking other threads would take longer
        const Format f = format_of(w[0]->kind);
        const bool interleaved = M > 1 && !on_tiles(M, f);
        products<T>(quantize<T>(x, M, K, w[0]->Kp, f.block, f.block == 256 ? 16 : 32, interleaved, used_threads), w, n, used_threads, out);
        w += n;
        out += n;
    }
    add_low_rank<T>(x, M, K, weights, threads, outs);
}

}  // namespace
