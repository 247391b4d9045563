// Where keys and values are stored: the new ones of the call, and a cache in a ring or in pages.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"
#include "vectors.h"

namespace {

// The queries of a call and the layout of the cache, the same for all layers.
struct Place {
    int64_t B, N;            // sequences, queries in total
    const int64_t* offsets;  // cu_seqlens (B + 1): sequence b has rows offsets[b]..offsets[b + 1]; null: N / B rows each
    const int64_t* start;    // (B): position of its first query
    const int64_t* held;     // (B): number of cached positions before `start`
    int64_t slots, origin;   // ring: position p of sequence b is at row b * slots + (p - origin) % slots
    const int64_t* table;    // pages: it is at row table[b * columns + p / page] * page + p % page; null: a ring
    int64_t columns, page;
    int64_t window;          // 0: none
};

struct Attend : Place {
    int64_t H, G, D;                // query heads, key heads, width
    const void* q;                  // (N, H, D): bfloat16 or float32
    const void *k, *v;              // (N, G, D): new keys and values, of the same type or int8
    const float *k_scale, *v_scale;  // (N, G): their scales, int8 only
    void *old_k, *old_v;            // (total slots, G, D): the cache, to which new keys and values are written if `keep`
    float *old_k_scale, *old_v_scale;
    void* out;                      // (N, H, D)
    int bf16, int8, keep, threads;
};

inline int64_t entry_bytes(const Attend& a) { return a.int8 ? 1 : a.bf16 ? 2 : 4; }

inline int64_t first_query(const Place& a, int64_t b) { return a.offsets ? a.offsets[b] : a.N / a.B * b; }

// The first cached or new position that is visible to a query at position p.
inline int64_t first_key(const Place& a, int64_t b, int64_t p) {
    const int64_t oldest = std::max(int64_t(0), a.start[b] - a.held[b]);
    return a.window ? std::max(oldest, p - a.window + 1) : oldest;
}

constexpr int64_t KEYS = 64;  // in a block

inline int64_t slot_of(const Place& a, int64_t b, int64_t p) {
    return a.table ? a.table[b * a.columns + p / a.page] * a.page + p % a.page : b * a.slots + (p - a.origin) % a.slots;
}

// The rows of the keys of one block of 64 positions.
struct BlockRows {
    int64_t first, last, old;  // keys first..old are in the cache, old..last are new
    int64_t row[KEYS];
};

inline void find_block(const Place& a, int64_t b, int64_t block, int64_t begin, int64_t end, BlockRows& at) {
    at.first = std::max(begin - block, int64_t(0));
    at.last = std::max(at.first, std::min(end - block, KEYS));
    at.old = std::min(std::max(a.start[b] - block, at.first), at.last);
    for (int64_t j = at.first; j < at.old; j++) {  // consecutive rows avoid a slow division per key
        const bool next = j > at.first && (a.table ? (block + j) % a.page : at.row[j - 1] + 1 - b * a.slots) != (a.table ? 0 : a.slots);
        at.row[j] = next ? at.row[j - 1] + 1 : slot_of(a, b, block + j);
    }
    for (int64_t j = at.old; j < at.last; j++) at.row[j] = first_query(a, b) + block + j - a.start[b];
}

// Prefetches the cached keys and values of heads g0..g1, whose rows are too far apart for the hardware prefetchers.
inline void prefetch_block(const Attend& a, const BlockRows& at, int64_t g0, int64_t g1) {
    const int64_t size = a.D * entry_bytes(a), bytes = (g1 - g0) * size;
    for (int64_t j = at.first; j < at.old; j++)
        for (int64_t i = 0, from = (at.row[j] * a.G + g0) * size; i < bytes; i += 64) {
            __builtin_prefetch(static_cast<const char*>(a.old_k) + from + i, 0, 2);
            __builtin_prefetch(static_cast<const char*>(a.old_v) + from + i, 0, 2);
        }
}

// Converts int8 codes to bfloat16, which represents them exactly.
inline void codes_to_bf16(const int8_t* codes, int64_t n, uint16_t* out) {
    int64_t d = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    for (; d + 32 <= n; d += 32) {
        const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + d)));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(words)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, 1)));
        _mm512_storeu_si512(out + d, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
#endif
    for (; d < n; d++) out[d] = to_bf16(float(codes[d]));
}

// Loads keys or values of one head into rows of D32, with their scales. Missing keys are zeros, since NaN would spread.
inline void load_block(const Attend& a, const BlockRows& at, bool value, int64_t g, int64_t D32, uint16_t* line, float* scale) {
    for (int64_t j = 0; j < KEYS; j++, line += D32) {
        scale[j] = 0.0f;
        if (j < at.first || j >= at.last) {
            std::memset(line, 0, a.D * 2);
            continue;
        }
        const bool is_new = j >= at.old;
        const int64_t row = at.row[j] * a.G + g;
        const void* from = is_new ? (value ? a.v : a.k) : (value ? a.old_v : a.old_k);
        if (a.int8) {
            codes_to_bf16(static_cast<const int8_t*>(from) + row * a.D, a.D, line);
            scale[j] = (is_new ? (value ? a.v_scale : a.k_scale) : (value ? a.old_v_scale : a.old_k_scale))[row];
        } else {
            const uint16_t* numbers = static_cast<const uint16_t*>(from) + row * a.D;
            if (a.D == 128)
                std::memcpy(line, numbers, 256);  // constant size: inlined
            else
                std::memcpy(line, numbers, a.D * 2);
            scale[j] = 1.0f;
        }
    }
}

// Writes the new keys and values to the cache; of a chunk longer than the ring, only its end.
void write_kv(const Attend& a) {
    const int64_t row = a.G * a.D * entry_bytes(a);
    parallel(a.N * row < 1 << 17 ? 1 : a.threads, [&](int thread, int n) {
        const Span range = partition(a.N, thread, n);
        for (int64_t b = 0; b < a.B; b++) {
            const int64_t first = first_query(a, b), end = first_query(a, b + 1), kept = a.table ? first : std::max(first, end - a.slots);
            for (int64_t from = std::max(range.begin, kept); from < std::min(range.end, end); from++) {
                const int64_t to = slot_of(a, b, a.start[b] + from - first);
                std::memcpy(static_cast<char*>(a.old_k) + to * row, static_cast<const char*>(a.k) + from * row, row);
                std::memcpy(static_cast<char*>(a.old_v) + to * row, static_cast<const char*>(a.v) + from * row, row);
                if (a.int8) {
                    std::memcpy(a.old_k_scale + to * a.G, a.k_scale + from * a.G, a.G * 4);
                    std::memcpy(a.old_v_scale + to * a.G, a.v_scale + from * a.G, a.G * 4);
                }
            }
        }
    });
}

}  // namespace
