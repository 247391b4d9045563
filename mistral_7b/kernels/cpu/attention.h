// Softmax(Q K^T / sqrt(D)) V of bfloat16 or float32 queries, where a key is visible if 0 <= p_q - p_k < window.
//
// Keys are processed in blocks of 64 positions, aligned to multiples of 64, and each row keeps its own running maximum
// and sum. So the result of a row depends only on its keys: not on the chunk size, on where keys are stored, or on the
// other rows. A block without visible keys leaves a row unchanged, to the bit.
//
// The queries are a packed batch of sequences of different lengths: decode rows and prompt chunks in any mixture.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "float_attention.h"
#include "keys.h"
#include "scores.h"

namespace {

constexpr int64_t MAX_ROWS = 128;  // query rows that are processed together

// Queries t0..t1 of sequence b, for the query heads of key heads g0..g1.
struct WorkItem {
    int64_t b, t0, t1, g0, g1;
    int64_t cost;  // estimated, per key head
};

inline int64_t padded_rows(int64_t rows) { return (rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER * ROWS_TOGETHER; }

void attend_rows(const Attend& a, const Workspace& r, const WorkItem& u) {
    const int64_t R = a.H / a.G, rows = (u.t1 - u.t0) * R, padded = padded_rows(rows), all_rows = (u.g1 - u.g0) * padded;
    const float scale = 1.0f / __builtin_sqrtf(float(a.D));
    const int64_t start = a.start[u.b], end = start + u.t1, begin = first_key(a, u.b, start + u.t0), query0 = first_query(a, u.b) + u.t0;
    auto head_of = [&](int64_t g) {  // the rows of a head in the workspace
        Workspace head = r;
        const int64_t first = (g - u.g0) * padded;
        head.q += first * r.D32, head.o += first * r.D32, head.max += first, head.sum += first * 16;
        return head;
    };
    auto query = [&](int64_t m, int64_t g) { return ((query0 + m / R) * a.H + g * R + m % R) * a.D; };
    BlockRows block_rows[2];
    BlockRows *current = block_rows, *next = block_rows + 1;
    find_block(a, u.b, begin / KEYS * KEYS, begin, end, *current);
    prefetch_block(a, *current, u.g0, u.g1);
    std::memset(r.q, 0, all_rows * r.D32 * 2);
    std::memset(r.o, 0, all_rows * r.D32 * 4);
    std::memset(r.sum, 0, all_rows * 64);
    std::memset(r.p, 0, padded * KEYS * 2);
    for (int64_t m = 0; m < all_rows; m++) r.max[m] = -3.0e38f;
    for (int64_t g = u.g0; g < u.g1; g++) {
        for (int64_t m = 0; m < rows; m++) std::memcpy(head_of(g).q + m * r.D32, static_cast<const uint16_t*>(a.q) + query(m, g), a.D * 2);
        pack_queries(head_of(g), padded);
    }
    for (int64_t block = begin / KEYS * KEYS; block < end; block += KEYS, std::swap(current, next)) {
        find_block(a, u.b, block + KEYS, begin, end, *next);
        for (int64_t g = u.g0; g < u.g1; g++) {
            const Workspace head = head_of(g);
            load_block(a, *current, false, g, r.D32, r.line, r.k_scale);
            load_block(a, *current, true, g, r.D32, r.line + KEYS * r.D32, r.v_scale);
            if (g == u.g0) prefetch_block(a, *next, u.g0, u.g1);
            pack_block(head, padded);
            scores(head, padded);
            for (int64_t p = start + u.t0, m = 0; p < end; p++) {
                const int64_t first = std::max(int64_t(0), first_key(a, u.b, p) - block), last = std::min(KEYS, p + 1 - block);
                for (const int64_t stop = m + R; m < stop; m++) softmax_block(head, head.p, m, first, last, scale);
            }
            add_values(head, padded);
        }
    }
    for (int64_t g = u.g0; g < u.g1; g++)
        for (int64_t m = 0; m < rows; m++) {
            const Workspace head = head_of(g);
            const F16 sum = broadcast(reduce_sum(load(head.sum + 16 * m)));
            for (int64_t d = 0; d < a.D; d += 16) store(static_cast<uint16_t*>(a.out) + query(m, g) + d, load(head.o + m * r.D32 + d) / sum, a.D - d);
        }
}

struct Plan {
    const WorkItem* items;
    int64_t n;
    int64_t head, rows;  // max padded query rows of an item, per head and for its heads
};

// All work items. Threads take them dynamically; the result does not depend on the assignment.
Plan make_plan(const Attend& a) {
    static thread_local Scratch<WorkItem> items_scratch;
    static thread_local Scratch<int64_t> loads_scratch;
    const int64_t R = a.H / a.G, queries = std::max(int64_t(1), MAX_ROWS / R);
    int64_t parts = 0, cost = 0, n = 0, head = 0, rows = 0;
    for (int64_t b = 0; b < a.B; b++) parts += (first_query(a, b + 1) - first_query(a, b) + queries - 1) / queries;
    WorkItem *items = items_scratch.get(parts * (a.G + 1)), *unsplit = items + parts * a.G, *end = unsplit;
    auto padded = [&](const WorkItem& u) { return padded_rows((u.t1 - u.t0) * R); };
    for (int64_t b = 0; b < a.B; b++)
        for (int64_t t0 = 0, T = first_query(a, b + 1) - first_query(a, b); t0 < T; t0 += queries) {
            WorkItem u{b, t0, std::min(t0 + queries, T), 0, a.G, 0};
            const int64_t blocks = (a.start[b] + u.t1 + KEYS - 1) / KEYS - first_key(a, b, a.start[b] + t0) / KEYS;
            u.cost = blocks * (padded(u) + 32);  // packing a block takes as long as some 32 rows
            cost += u.cost * a.G;
            *end++ = u;
        }
    std::stable_sort(unsplit, end, [](const WorkItem& u, const WorkItem& v) { return u.cost > v.cost; });
    // Costliest first, each to the thread with the least load. An item has many heads, since adjacent keys are read
    // together, but no more than fill that thread's balanced load.
    int64_t *loads = loads_scratch.get(a.threads), balanced = (cost + a.threads - 1) / a.threads;
    std::fill_n(loads, a.threads, 0);
    for (const WorkItem* u = unsplit; u < end; u++)
        for (int64_t g = 0; g < a.G;) {
            int64_t& least = *std::min_element(loads, loads + a.threads);
            const int64_t max_heads = std::min(a.G - g, MAX_ROWS / padded(*u)), heads = std::max(int64_t(1), std::min(max_heads, (balanced - least) / u->cost));
            items[n++] = {u->b, u->t0, u->t1, g, g + heads, u->cost};
            least += heads * u->cost, g += heads;
            head = std::max(head, padded(*u)), rows = std::max(rows, heads * padded(*u));
        }
    return {items, n, head, rows};
}

void attend(const Attend& a, const Plan& plan) {
    const int64_t to = a.bf16 && ROWS_TOGETHER > 1 ? 32 : 16 * COLUMNS, D32 = (a.D + to - 1) / to * to;
    std::atomic<int64_t> next_item{0};
    parallel(a.threads, [&](int, int) {
        static thread_local Scratch<float> workspace_scratch;
        // In floats: k, v, line, q and p are bfloat16, or k, v and line floats.
        const int64_t block = KEYS * D32, sizes[] = {block, block, block, plan.rows * D32 / 2, plan.head * KEYS / 2, plan.head * KEYS, plan.rows * D32, plan.rows, plan.rows * 16, KEYS, KEYS};
        int64_t all_sizes = 0;
        for (int64_t size : sizes) all_sizes += (size + 15) / 16 * 16;
        float *at = workspace_scratch.get(all_sizes), *buffers[11];
        for (int i = 0; i < 11; i++) {
            buffers[i] = at;
            at += (sizes[i] + 15) / 16 * 16;
        }
        auto half = [&](int i) { return reinterpret_cast<uint16_t*>(buffers[i]); };
        const Workspace r{D32, half(0), half(1), half(3), half(4), half(2), buffers[0], buffers[1], buffers[5], buffers[6], buffers[7], buffers[8], buffers[9], buffers[10]};
        if (!a.bf16) {
            std::memset(r.vf, 0, block * 4);  // the padding of D stays zero
            std::memset(r.v_scale, 0, KEYS * 4);
            for (int64_t i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < plan.n;) {
                const WorkItem& u = plan.items[i];
                for (int64_t g = u.g0; g < u.g1; g++) attend_floats(a, r, u.b, u.t0, u.t1, g);
            }
            return;
        }
        std::memset(r.line, 0, 2 * block * 2);  // the padding of D stays zero
#if defined(WITH_AMX)
        configure_tiles(64);
#endif
        for (int64_t i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < plan.n;) attend_rows(a, r, plan.items[i]);
#if defined(WITH_AMX)
        _tile_release();
#endif
    });
    if (a.keep) write_kv(a);
}

}  // namespace
