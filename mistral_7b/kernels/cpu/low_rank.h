// What adapters (LoRA) add to a product, each to rows of its own.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "threads.h"
#include "vectors.h"
#include "weights.h"

namespace {

constexpr int64_t ADD_AHEAD = 2048;  // elements ahead of a load at which memory is asked for, while rows are few

// One adapter's part in one product: y += (x a^T) b, a (rank, K), b (rank, N) of x's type; rank a multiple of 4 or 0.
struct LowRank {
    int64_t rank;
    const void *a, *b;
};

// Which rows of a call belong to which adapters: the first counts[0] of `rows` to number which[0], and so on.
struct Mixture {
    int64_t n;
    const int64_t *which, *counts, *rows;
    int64_t total;    // rows of the call, those without an adapter too
    int64_t refused;  // set to the rows of a call that had another number of them: nothing was added there
};

struct LowRankCall {
    const LowRank* adapters;
    Mixture* mixture;
    const void* x;  // (M, K)
    void* y;        // (M, N), added to
    int64_t M, K, N;
    int bf16, threads;
};

// An adapter's part in one product, for all of its rows. t: `rank` floats for each of them.
template <class T>
struct Addition {
    const typename T::Store *a, *b, *x;
    typename T::Store* y;
    const int64_t* rows;
    float* t;
    int64_t count, rank, K, N;
};

constexpr int64_t ADD_RANKS = 4, ADD_OUTPUTS = 64, ADD_ROWS = 6;  // at once

// t = x a^T for R rows and four ranks. Each sum has one order, whatever is computed beside it.
template <class T, int R>
void add_inner(const Addition<T>& w, int64_t row, int64_t rank) {
    F16 sum[R][ADD_RANKS] = {};
    const typename T::Store *x[R], *a = w.a + rank * w.K;
    for (int i = 0; i < R; i++) x[i] = w.x + w.rows[row + i] * w.K;
    auto step = [&](int64_t k, int64_t n) {
        F16 v[R];
        for (int i = 0; i < R; i++) v[i] = load(x[i] + k, n);
        for (int j = 0; j < ADD_RANKS; j++) {
            const F16 factor = load(a + j * w.K + k, n);
            for (int i = 0; i < R; i++) sum[i][j] = fused(v[i], factor, sum[i][j]);
        }
    };
    int64_t k = 0;
    for (; k + 16 <= w.K; k += 16) {
        for (int j = 0; j < ADD_RANKS && R < 4; j++) __builtin_prefetch(a + j * w.K + k + ADD_AHEAD);
        step(k, 16);
    }
    if (k < w.K) step(k, w.K - k);
    for (int i = 0; i < R; i++)
        for (int j = 0; j < ADD_RANKS; j++) w.t[(row + i) * w.rank + rank + j] = total(sum[i][j]);
}

// y += t b for R rows and up to 64 outputs, rounded once.
template <class T, int R>
void add_outer(const Addition<T>& w, int64_t row, int64_t n) {
    constexpr int U = ADD_OUTPUTS / 16;
    F16 sum[R][U] = {};
    const int64_t left = w.N - n;
    for (int64_t j = 0; j < w.rank; j++) {
        const auto* b = w.b + j * w.N + n;
        for (int u = 0; u < U && 16 * u < left; u++) {
            if (R < 4) __builtin_prefetch(b + 16 * u + ADD_AHEAD);
            const F16 factor = load(b + 16 * u, left - 16 * u);
            for (int i = 0; i < R; i++) sum[i][u] = fused(factor, all(w.t[(row + i) * w.rank + j]), sum[i][u]);
        }
    }
    for (int i = 0; i < R; i++) {
        auto* y = w.y + w.rows[row + i] * w.N + n;
        for (int u = 0; u < U && 16 * u < left; u++)
            store(y + 16 * u, load(y + 16 * u, left - 16 * u) + sum[i][u], left - 16 * u);
    }
}

// f(addition, first row, piece, constant: how many rows) for every few rows and piece, shared out to threads. All pieces
// for the same rows come together: rows of y lie so far apart that each walk through all of them misses every cache.
template <class T, class Pieces, class F>
void share_additions(const Addition<T>* parts, int64_t n, int threads, Pieces pieces, F f) {
    auto units_of = [&](const Addition<T>& w) { return (w.count + ADD_ROWS - 1) / ADD_ROWS * pieces(w); };
    int64_t units = 0;
    for (int64_t i = 0; i < n; i++) units += units_of(parts[i]);
    parallel(threads, [&](int t, int of) {
        const Span mine = share(units, t, of);
        int64_t first = 0;
        for (const auto* w = parts; w != parts + n; first += units_of(*w++)) {
            for (int64_t u = std::max(mine.begin - first, int64_t(0)); u < std::min(mine.end - first, units_of(*w)); u++) {
                const int64_t row = u / pieces(*w) * ADD_ROWS, piece = u % pieces(*w);
                switch (std::min(ADD_ROWS, w->count - row)) {
                    case 1: f(*w, row, piece, std::integral_constant<int, 1>()); break;
                    case 2: f(*w, row, piece, std::integral_constant<int, 2>()); break;
                    case 3: f(*w, row, piece, std::integral_constant<int, 3>()); break;
                    case 4: f(*w, row, piece, std::integral_constant<int, 4>()); break;
                    case 5: f(*w, row, piece, std::integral_constant<int, 5>()); break;
                    default: f(*w, row, piece, std::integral_constant<int, ADD_ROWS>());
                }
            }
        }
    });
}

// What adapters add to the products of one x (M, K) by several weights.
template <class T>
void add_low_rank(const void* x, int64_t M, int64_t K, std::initializer_list<const Weights*> weights, int threads, std::initializer_list<void*> outs) {
    static thread_local Scratch<float> t_of;
    static thread_local Scratch<Addition<T>> parts_of;
    using S = typename T::Store;
    int64_t most = 0, n = 0, floats = 0, work = 0;
    for (const Weights* w : weights) most += w->mixture ? w->mixture->n : 0;
    if (!most) return;
    Addition<T>* parts = parts_of.get(most);
    void* const* out = outs.begin();
    for (const Weights* w : weights) {
        void* y = *out++;
        if (!w->mixture) continue;
        Mixture& mix = *w->mixture;
        if (mix.total != M) {
            mix.refused = M;
            continue;
        }
        const int64_t* rows = mix.rows;
        for (int64_t i = 0; i < mix.n; rows += mix.counts[i++]) {
            const LowRank& of = w->adapters[mix.which[i]];
            parts[n++] = {(const S*)of.a, (const S*)of.b, (const S*)x, (S*)y, rows, nullptr, mix.counts[i], of.rank, K, w->N};
            floats += mix.counts[i] * of.rank;
            work += mix.counts[i] * of.rank * (K + w->N);
        }
    }
    float* t = t_of.get(floats);
    for (auto* w = parts; w != parts + n; t += w->count * w->rank, w++) w->t = t;
    if (work < 1 << 18) threads = 1;  // waking another would take longer
    share_additions(parts, n, threads, [](const Addition<T>& w) { return w.rank / ADD_RANKS; },
                    [](const Addition<T>& w, int64_t row, int64_t piece, auto R) { add_inner<T, R>(w, row, piece * ADD_RANKS); });
    share_additions(parts, n, threads, [](const Addition<T>& w) { return w.rank ? (w.N + ADD_OUTPUTS - 1) / ADD_OUTPUTS : 0; },
                    [](const Addition<T>& w, int64_t row, int64_t piece, auto R) { add_outer<T, R>(w, row, piece * ADD_OUTPUTS); });
}

}  // namespace
