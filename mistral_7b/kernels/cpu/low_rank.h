// LoRA updates of products, with an adapter per row.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "threads.h"
#include "vectors.h"
#include "weights.h"

namespace {

constexpr int64_t LORA_PREFETCH = 2048;  // prefetch distance in elements, for few rows

// The factors of one adapter for one product: y += (x a^T) b, a (rank, K), b (rank, N) of x's type; rank % 4 == 0.
struct LowRank {
    int64_t rank;
    const void *a, *b;
};

// The adapter of each row of a call: the first counts[0] entries of `rows` use adapter which[0], and so on.
struct Mixture {
    int64_t n;
    const int64_t *which, *counts, *rows;
    int64_t total;    // rows of the call, including those without an adapter
    int64_t refused;  // set to M by a product with M != total, which is not updated
};

struct LowRankCall {
    const LowRank* adapters;
    Mixture* mixture;
    const void* x;  // (M, K)
    void* y;        // (M, N), added to
    int64_t M, K, N;
    int bf16, threads;
};

// The update of one product by one adapter. t: workspace of `rank` floats per row.
template <class T>
struct Update {
    const typename T::Store *a, *b, *x;
    typename T::Store* y;
    const int64_t* rows;
    float* t;
    int64_t count, rank, K, N;
};

constexpr int64_t LORA_RANKS = 4, LORA_OUTPUTS = 64, LORA_ROWS = 6;  // computed at a time

// t = x a^T for R rows and 4 ranks. The order of each sum does not depend on R.
template <class T, int R>
void project_to_rank(const Update<T>& w, int64_t row, int64_t rank) {
    F16 sum[R][LORA_RANKS] = {};
    const typename T::Store *x[R], *a = w.a + rank * w.K;
    for (int i = 0; i < R; i++) x[i] = w.x + w.rows[row + i] * w.K;
    auto step = [&](int64_t k, int64_t n) {
        F16 v[R];
        for (int i = 0; i < R; i++) v[i] = load(x[i] + k, n);
        for (int j = 0; j < LORA_RANKS; j++) {
            const F16 factor = load(a + j * w.K + k, n);
            for (int i = 0; i < R; i++) sum[i][j] = fmadd(v[i], factor, sum[i][j]);
        }
    };
    int64_t k = 0;
    for (; k + 16 <= w.K; k += 16) {
        for (int j = 0; j < LORA_RANKS && R < 4; j++) __builtin_prefetch(a + j * w.K + k + LORA_PREFETCH);
        step(k, 16);
    }
    if (k < w.K) step(k, w.K - k);
    for (int i = 0; i < R; i++)
        for (int j = 0; j < LORA_RANKS; j++) w.t[(row + i) * w.rank + rank + j] = reduce_sum(sum[i][j]);
}

// y += t b for R rows and up to 64 outputs, rounded once.
template <class T, int R>
void add_from_rank(const Update<T>& w, int64_t row, int64_t n) {
    constexpr int U = LORA_OUTPUTS / 16;
    F16 sum[R][U] = {};
    const int64_t left = w.N - n;
    for (int64_t j = 0; j < w.rank; j++) {
        const auto* b = w.b + j * w.N + n;
        for (int u = 0; u < U && 16 * u < left; u++) {
            if (R < 4) __builtin_prefetch(b + 16 * u + LORA_PREFETCH);
            const F16 factor = load(b + 16 * u, left - 16 * u);
            for (int i = 0; i < R; i++) sum[i][u] = fmadd(factor, broadcast(w.t[(row + i) * w.rank + j]), sum[i][u]);
        }
    }
    for (int i = 0; i < R; i++) {
        auto* y = w.y + w.rows[row + i] * w.N + n;
        for (int u = 0; u < U && 16 * u < left; u++)
            store(y + 16 * u, load(y + 16 * u, left - 16 * u) + sum[i][u], left - 16 * u);
    }
}

// Calls f(update, first row, chunk, constant number of rows) for all groups of rows and chunks, in parallel. All chunks
// of the same rows are consecutive, since iterating over the distant rows of y misses the caches.
template <class T, class Chunks, class F>
void parallel_updates(const Update<T>* updates, int64_t n, int threads, Chunks chunks, F f) {
    auto count_units = [&](const Update<T>& w) { return (w.count + LORA_ROWS - 1) / LORA_ROWS * chunks(w); };
    int64_t units = 0;
    for (int64_t i = 0; i < n; i++) units += count_units(updates[i]);
    parallel(threads, [&](int t, int of) {
        const Span range = partition(units, t, of);
        int64_t first = 0;
        for (const auto* w = updates; w != updates + n; first += count_units(*w++)) {
            for (int64_t u = std::max(range.begin - first, int64_t(0)); u < std::min(range.end - first, count_units(*w)); u++) {
                const int64_t row = u / chunks(*w) * LORA_ROWS, chunk = u % chunks(*w);
                switch (std::min(LORA_ROWS, w->count - row)) {
                    case 1: f(*w, row, chunk, std::integral_constant<int, 1>()); break;
                    case 2: f(*w, row, chunk, std::integral_constant<int, 2>()); break;
                    case 3: f(*w, row, chunk, std::integral_constant<int, 3>()); break;
                    case 4: f(*w, row, chunk, std::integral_constant<int, 4>()); break;
                    case 5: f(*w, row, chunk, std::integral_constant<int, 5>()); break;
                    default: f(*w, row, chunk, std::integral_constant<int, LORA_ROWS>());
                }
            }
        }
    });
}

// Adds the LoRA updates to the products of one x (M, K) with several weights.
template <class T>
void add_low_rank(const void* x, int64_t M, int64_t K, std::initializer_list<const Weights*> weights, int threads, std::initializer_list<void*> outs) {
    static thread_local Scratch<float> t_scratch;
    static thread_local Scratch<Update<T>> updates_scratch;
    using S = typename T::Store;
    int64_t max_updates = 0, n = 0, floats = 0, work = 0;
    for (const Weights* w : weights) max_updates += w->mixture ? w->mixture->n : 0;
    if (!max_updates) return;
    Update<T>* updates = updates_scratch.get(max_updates);
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
            updates[n++] = {(const S*)of.a, (const S*)of.b, (const S*)x, (S*)y, rows, nullptr, mix.counts[i], of.rank, K, w->N};
            floats += mix.counts[i] * of.rank;
            work += mix.counts[i] * of.rank * (K + w->N);
        }
    }
    float* t = t_scratch.get(floats);
    for (auto* w = updates; w != updates + n; t += w->count * w->rank, w++) w->t = t;
    if (work < 1 << 18) threads = 1;  // waking other threads would take longer
    parallel_updates(updates, n, threads, [](const Update<T>& w) { return w.rank / LORA_RANKS; },
                     [](const Update<T>& w, int64_t row, int64_t chunk, auto R) { project_to_rank<T, R>(w, row, chunk * LORA_RANKS); });
    parallel_updates(updates, n, threads, [](const Update<T>& w) { return w.rank ? (w.N + LORA_OUTPUTS - 1) / LORA_OUTPUTS : 0; },
                     [](const Update<T>& w, int64_t row, int64_t chunk, auto R) { add_from_rank<T, R>(w, row, chunk * LORA_OUTPUTS); });
}

}  // namespace
