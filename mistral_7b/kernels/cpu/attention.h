// Softmax(Q K^T / sqrt(D)) V of bfloat16 queries, where a key is visible if 0 <= p_q - p_k < window.
//
// Keys are worked through in blocks of 64 positions that begin at multiples of 64, and each row keeps its own
// maximum and sum: so a row's result depends on its keys alone, not on the chunk it came in, on where its keys
// lie, or on the rows beside it. A row for which a block shows nothing is left as it is, to the bit.
//
// The queries of all sequences lie one after another, as many of each as it has: a row of decoding beside a chunk of
// a prompt. A rectangle is the case of equal numbers.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "keys.h"
#include "scores.h"

namespace {

constexpr int64_t MOST_ROWS = 128;  // of queries that go through a block together

// A piece of work: queries t0..t1 of sequence b, for the query heads of key heads g0..g1.
struct Unit {
    int64_t b, t0, t1, g0, g1;
    int64_t cost;  // of one of these heads, about
};

void attend_rows(const Attend& a, const Workspace& r, const Unit& u) {
    const int64_t R = a.H / a.G, rows = (u.t1 - u.t0) * R, padded = (rows + 15) / 16 * 16, all_rows = (u.g1 - u.g0) * padded;
    const float scale = 1.0f / __builtin_sqrtf(float(a.D));
    const int64_t start = a.start[u.b], end = start + u.t1, begin = first_key(a, u.b, start + u.t0), query0 = first_row(a, u.b) + u.t0;
    auto head_of = [&](int64_t g) {  // each head has rows of its own in the workspace
        Workspace own = r;
        const int64_t first = (g - u.g0) * padded;
        own.q += first * r.D32, own.o += first * r.D32, own.top += first, own.sum += first * 16;
        return own;
    };
    auto query = [&](int64_t m, int64_t g) { return ((query0 + m / R) * a.H + g * R + m % R) * a.D; };
    Places places[2];
    Places *now = places, *next = places + 1;
    find_block(a, u.b, begin / KEYS * KEYS, begin, end, *now);
    ask_for_block(a, *now, u.g0, u.g1);
    std::memset(r.q, 0, all_rows * r.D32 * 2);
    std::memset(r.o, 0, all_rows * r.D32 * 4);
    std::memset(r.sum, 0, all_rows * 64);
    std::memset(r.p, 0, padded * KEYS * 2);
    for (int64_t m = 0; m < all_rows; m++) r.top[m] = -3.0e38f;
    for (int64_t g = u.g0; g < u.g1; g++) {
        for (int64_t m = 0; m < rows; m++) std::memcpy(head_of(g).q + m * r.D32, a.q + query(m, g), a.D * 2);
        place_queries(head_of(g), padded);
    }
    for (int64_t block = begin / KEYS * KEYS; block < end; block += KEYS, std::swap(now, next)) {
        find_block(a, u.b, block + KEYS, begin, end, *next);
        for (int64_t g = u.g0; g < u.g1; g++) {
            const Workspace own = head_of(g);
            read_block(a, *now, false, g, r.D32, r.line, r.k_scale);
            read_block(a, *now, true, g, r.D32, r.line + KEYS * r.D32, r.v_scale);
            if (g == u.g0) ask_for_block(a, *next, u.g0, u.g1);
            place_block(own, padded);
            scores(own, padded);
            for (int64_t p = start + u.t0, m = 0; p < end; p++) {
                const int64_t first = std::max(int64_t(0), first_key(a, u.b, p) - block), last = std::min(KEYS, p + 1 - block);
                for (const int64_t stop = m + R; m < stop; m++) softmax_block(own, m, first, last, scale);
            }
            add_values(own, padded);
        }
    }
    for (int64_t g = u.g0; g < u.g1; g++)
        for (int64_t m = 0; m < rows; m++) {
            const Workspace own = head_of(g);
            const F16 sum = all(total(load(own.sum + 16 * m)));
            for (int64_t d = 0; d < a.D; d += 16) store(a.out + query(m, g) + d, load(own.o + m * r.D32 + d) / sum, a.D - d);
        }
}

struct Plan {
    const Unit* units;
    int64_t n;
    int64_t head, rows;  // rows of queries, padded, of one head and of all heads: the most that a unit has
};

// All work in pieces, which threads take one after another: who takes what is of no account for the result.
Plan make_plan(const Attend& a) {
    static thread_local Scratch<Unit> units_of;
    static thread_local Scratch<int64_t> loads_of;
    const int64_t R = a.H / a.G, queries = std::max(int64_t(1), MOST_ROWS / R);
    int64_t parts = 0, cost = 0, n = 0, head = 0, rows = 0;
    for (int64_t b = 0; b < a.B; b++) parts += (first_row(a, b + 1) - first_row(a, b) + queries - 1) / queries;
    Unit *units = units_of.get(parts * (a.G + 1)), *whole = units + parts * a.G, *end = whole;
    auto padded = [&](const Unit& u) { return ((u.t1 - u.t0) * R + 15) / 16 * 16; };
    for (int64_t b = 0; b < a.B; b++)
        for (int64_t t0 = 0, T = first_row(a, b + 1) - first_row(a, b); t0 < T; t0 += queries) {
            Unit u{b, t0, std::min(t0 + queries, T), 0, a.G, 0};
            const int64_t blocks = (a.start[b] + u.t1 + KEYS - 1) / KEYS - first_key(a, b, a.start[b] + t0) / KEYS;
            u.cost = blocks * (padded(u) + 32);  // laying a block out takes the time of some 32 rows
            cost += u.cost * a.G;
            *end++ = u;
        }
    std::stable_sort(whole, end, [](const Unit& u, const Unit& v) { return u.cost > v.cost; });
    // The costliest first, each to the thread that has least. A unit is of many heads, since what lies side by side is
    // read together, but of no more than fill that thread's share.
    int64_t *loads = loads_of.get(a.threads), fair = (cost + a.threads - 1) / a.threads;
    std::fill_n(loads, a.threads, 0);
    for (const Unit* u = whole; u < end; u++)
        for (int64_t g = 0; g < a.G;) {
            int64_t& least = *std::min_element(loads, loads + a.threads);
            const int64_t most = std::min(a.G - g, MOST_ROWS / padded(*u)), heads = std::max(int64_t(1), std::min(most, (fair - least) / u->cost));
            units[n++] = {u->b, u->t0, u->t1, g, g + heads, u->cost};
            least += heads * u->cost, g += heads;
            head = std::max(head, padded(*u)), rows = std::max(rows, heads * padded(*u));
        }
    return {units, n, head, rows};
}

void attend(const Attend& a, const Plan& plan) {
    const int64_t D32 = (a.D + 31) / 32 * 32;
    std::atomic<int64_t> taken{0};
    parallel(a.threads, [&](int, int) {
        static thread_local Scratch<float> workspace_of;
        // In floats: k, v and line are bfloat16 (or k, v float), q and p too.
        const int64_t block = KEYS * D32, sizes[] = {block, block, block, plan.rows * D32 / 2, plan.head * KEYS / 2, plan.head * KEYS, plan.rows * D32, plan.rows, plan.rows * 16, KEYS, KEYS};
        int64_t all_sizes = 0;
        for (int64_t size : sizes) all_sizes += (size + 15) / 16 * 16;
        float *at = workspace_of.get(all_sizes), *place[11];
        for (int i = 0; i < 11; i++) {
            place[i] = at;
            at += (sizes[i] + 15) / 16 * 16;
        }
        auto half = [&](int i) { return reinterpret_cast<uint16_t*>(place[i]); };
        const Workspace r{D32, half(0), half(1), half(3), half(4), half(2), place[0], place[1], place[5], place[6], place[7], place[8], place[9], place[10]};
        std::memset(r.line, 0, 2 * block * 2);  // the padding of D stays zero
#if defined(WITH_AMX)
        configure_tiles();
#endif
        for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < plan.n;) attend_rows(a, r, plan.units[i]);
#if defined(WITH_AMX)
        _tile_release();
#endif
    });
    if (a.keep) remember(a);
}

}  // namespace
