// Products of many rows on AMX: tiles of 16 rows by 16 outputs by 64 inputs. Empty without AMX.

#pragma once

#include <algorithm>
#include <cstdint>

#include "few_rows.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__linux__)
#define WITH_AMX
#endif

namespace {

#if defined(WITH_AMX)

constexpr int64_t NB = 16, KB = 4096, MB = 512;  // block size: tiles of outputs, inputs (1 MB of codes in L2), rows

void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

// The tile intrinsics do not tell the compiler that they access memory.
inline void fence() { __asm__ volatile("" ::: "memory"); }

inline void clear_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Tiles 0..3 += A B over `steps` tiles of inputs, for 32 rows by up to 2 tiles of outputs.
inline void steps_2x2(const int8_t* a, int64_t lda, const uint8_t* b, int64_t ldb, int64_t steps, int64_t count) {
    fence();
    if (count < 2) ldb = 0;  // uses the single tile twice; the second result is ignored
    for (int64_t i = 0; i < steps; i++) {
        for (int64_t line = (i + 2) * 1024; line < (i + 3) * 1024; line += LINE) {
            __builtin_prefetch(b + line);
            __builtin_prefetch(b + ldb + line);
        }
        _tile_loadd(4, a + i * 64, lda);
        _tile_loadd(6, b + i * 1024, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b + ldb + i * 1024, 64);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, a + 16 * lda + i * 64, lda);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    fence();
}

// The same, for 16 rows by up to 4 tiles of outputs.
inline void steps_1x4(const int8_t* a, int64_t lda, const uint8_t* b, int64_t ldb, int64_t steps, int64_t count) {
    fence();
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(4, a + i * 64, lda);
        _tile_loadd(5, b + i * 1024, 64);
        _tile_dpbsud(0, 4, 5);
        if (count > 1) {
            _tile_loadd(6, b + ldb + i * 1024, 64);
            _tile_dpbsud(1, 4, 6);
        }
        if (count > 2) {
            _tile_loadd(7, b + 2 * ldb + i * 1024, 64);
            _tile_dpbsud(2, 4, 7);
        }
        if (count > 3) {
            _tile_loadd(5, b + 3 * ldb + i * 1024, 64);
            _tile_dpbsud(3, 4, 5);
        }
    }
    fence();
}

// Loads tiles 0..3 from memory, or stores them: C is (32 rows, 32 outputs) if `two`, else (16, 16 * count).
inline void load_sums(const int32_t* c, int64_t ldc, bool two, int64_t count) {
    fence();
    const int64_t second = 16, third = two ? 16 * ldc : 32, fourth = two ? 16 * ldc + 16 : 48;
    _tile_loadd(0, c, ldc * 4);
    if (count > 1) _tile_loadd(1, c + second, ldc * 4);
    if (two || count > 2) _tile_loadd(2, c + third, ldc * 4);
    if (two ? count > 1 : count > 3) _tile_loadd(3, c + fourth, ldc * 4);
}
inline void store_sums(int32_t* c, int64_t ldc, bool two, int64_t count) {
    fence();
    const int64_t second = 16, third = two ? 16 * ldc : 32, fourth = two ? 16 * ldc + 16 : 48;
    _tile_stored(0, c, ldc * 4);
    if (count > 1) _tile_stored(1, c + second, ldc * 4);
    if (two || count > 2) _tile_stored(2, c + third, ldc * 4);
    if (two ? count > 1 : count > 3) _tile_stored(3, c + fourth, ldc * 4);
    fence();
}

// The given rows by one block of output tiles, over all inputs.
template <class T>
void amx_block(const Rows& r, const Weights& w, Span rows, Span tiles, uint8_t* panel, int32_t* c, void* out) {
    constexpr int64_t ldc = NB * TILE_N;
    const int64_t padded = (rows.end - rows.begin + 15) / 16 * 16;
    for (int64_t k = 0; k < w.Kp; k += KB) {
        const int64_t depth = std::min(KB, w.Kp - k), steps = depth / 64;
        const uint8_t* b = w.codes + tiles.begin * w.Kp * TILE_N + k * TILE_N;
        int64_t ldb = w.Kp * TILE_N;
        if (w.bits == 4) {
            for (int64_t t = tiles.begin; t < tiles.end; t++)
                repack_tile(w, t, k, k + depth, panel + (t - tiles.begin) * depth * TILE_N);
            b = panel;
            ldb = depth * TILE_N;
        }
        const int64_t width = tiles.end - tiles.begin;
        for (int64_t m = 0; m < padded;) {
            const int8_t* a = r.q + (rows.begin + m) * r.Kp + k;
            const bool two = padded - m >= 32;
            for (int64_t t = 0; t < width; t += two ? 2 : 4) {
                const int64_t count = std::min(width - t, int64_t(two ? 2 : 4));
                int32_t* at = c + m * ldc + t * 16;
                clear_tiles();
                if (k) load_sums(at, ldc, two, count);
                two ? steps_2x2(a, r.Kp, b + t * ldb, ldb, steps, count) : steps_1x4(a, r.Kp, b + t * ldb, ldb, steps, count);
                store_sums(at, ldc, two, count);
            }
            m += two ? 32 : 16;
        }
    }
    for (int64_t m = rows.begin; m < rows.end; m++) {
        int32_t sum = 0;
        for (int64_t g = 0; g < r.Kp / r.group; g++) sum += r.sum[m * (r.Kp / r.group) + g];
        for (int64_t t = tiles.begin; t < tiles.end; t++) {
            int32_t* v = c + (m - rows.begin) * ldc + (t - tiles.begin) * 16;
            for (int i = 0; i < 16; i++) v[i] -= 128 * sum;
            finish<T>(r, w, m, t, v, out);
        }
    }
}

// Up to 16 MT rows by `count` tiles of outputs (up to 4 / MT), over all inputs. int4 codes are repacked just before
// use, while the matrix unit processes the previous ones.
template <class T, int MT>
void amx_few(const Rows& r, const Weights& w, int64_t row, int64_t tile, int64_t count, void* out) {
    constexpr int64_t CHUNK = 128;
    alignas(64) uint8_t repacked[4 / MT * CHUNK * TILE_N];
    alignas(64) int32_t c[16 * MT * 64 / MT];
    constexpr int64_t ldc = 64 / MT;
    const int8_t* a = r.q + row * r.Kp;
    for (int64_t k = 0; k < w.Kp; k += CHUNK) {
        const int64_t depth = std::min(CHUNK, w.Kp - k);
        const uint8_t* b = w.codes + tile * w.Kp * TILE_N + k * TILE_N;
        int64_t ldb = w.Kp * TILE_N;
        if (w.bits == 4) {
            ldb = depth * TILE_N;
            for (int64_t t = 0; t < count; t++) repack_tile(w, tile + t, k, k + depth, repacked + t * ldb);
            b = repacked;
        } else {
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 0; i < depth * TILE_N; i += LINE) __builtin_prefetch(b + t * ldb + i + AHEAD);
        }
        if (k == 0) clear_tiles();
        MT == 1 ? steps_1x4(a + k, r.Kp, b, ldb, depth / 64, count) : steps_2x2(a + k, r.Kp, b, ldb, depth / 64, count);
    }
    store_sums(c, ldc, MT == 2, count);
    for (int64_t m = 0; m < std::min(int64_t(16 * MT), r.M - row); m++) {
        int32_t sum = 0;
        for (int64_t g = 0; g < r.Kp / r.group; g++) sum += r.sum[(row + m) * (r.Kp / r.group) + g];
        for (int64_t t = 0; t < count; t++) {
            int32_t* v = c + m * ldc + t * 16;
            for (int i = 0; i < 16; i++) v[i] -= 128 * sum;
            finish<T>(r, w, row + m, tile + t, v, out);
        }
    }
}

template <class T>
void amx_linear(const Rows& r, const Weights& w, int threads, void* out) {
    const int64_t tiles = (w.N + 15) / 16;
    if (r.M <= 32) {
        const int64_t width = r.M <= 16 ? 4 : 2, blocks = (tiles + width - 1) / width;
        parallel(threads, [&](int t, int n) {
            configure_tiles();
            const Span range = partition(blocks, t, n);
            for (int64_t b = range.begin; b < range.end; b++) {
                const int64_t tile = b * width, count = std::min(width, tiles - tile);
                width == 4 ? amx_few<T, 1>(r, w, 0, tile, count, out) : amx_few<T, 2>(r, w, 0, tile, count, out);
            }
            _tile_release();
        });
        return;
    }
    // Blocks of outputs, smaller if there are too few for the threads.
    int64_t width = NB;
    while (width > 4 && (tiles + width - 1) / width < 4 * threads) width /= 2;
    const int64_t blocks = (tiles + width - 1) / width;
    parallel(threads, [&](int t, int n) {
        static thread_local Scratch<uint8_t> panel_scratch;
        static thread_local Scratch<int32_t> sums_scratch;
        uint8_t* panel = panel_scratch.get(NB * TILE_N * KB);
        int32_t* c = sums_scratch.get(MB * NB * TILE_N);
        configure_tiles();
        const Span range = partition(blocks, t, n);
        for (int64_t b = range.begin; b < range.end; b++)
            for (int64_t m = 0; m < r.M; m += MB)
                amx_block<T>(r, w, {m, std::min(m + MB, r.M)}, {b * width, std::min((b + 1) * width, tiles)}, panel, c, out);
        _tile_release();
    });
}

#endif

}  // namespace
