// Products with weights in GGUF blocks of 32 (Q8_0 and Q4_0).

#pragma once

#include <cstdint>

#include "lines.h"
#include "weights.h"
#include "few_rows.h"

namespace {

// R rows by one tile: the integer sum of each block times its two scales, added in block order.
template <class T, int R>
void block_tile(const Rows& r, const Weights& w, int64_t row, int64_t tile, void* out) {
    F16 y[R] = {};
    const uint8_t* codes = w.codes + tile * w.Kp * 2 * w.bits;
    const uint16_t* d = w.d + tile * (w.Kp / BLOCK) * TILE_N;
    const int64_t G = w.Kp / BLOCK;
    for (int64_t g = 0; g < G; g++, d += TILE_N) {
        Sums s[R];
        for (auto& v : s) v = zero();
        const int8_t* x = r.q + row * r.Kp + g * BLOCK;
        for (int64_t k = 0; k < BLOCK; codes += LINE) {
            __builtin_prefetch(codes + AHEAD);
            const Line line = load(codes);
            if (w.bits == 8) {
                for (int i = 0; i < R; i++) s[i] = dot8(s[i], line, x + i * r.Kp + k);
                k += 4;
            } else {
                const Line lo = low(line), hi = high(line);
                for (int i = 0; i < R; i++) s[i] = dot4(dot4(s[i], lo, x + i * r.Kp + k), hi, x + i * r.Kp + k + 4);
                k += 8;
            }
        }
        F16 scale;
        for (int n = 0; n < 16; n++) scale[n] = from_half(d[n]);
        for (int i = 0; i < R; i++) {
            I16 v;
            store(reinterpret_cast<int32_t*>(&v), s[i]);
            v -= (w.bits == 8 ? SUBTRACT : 8) * r.sum[(row + i) * G + g];
            y[i] += __builtin_convertvector(v, F16) * (scale * r.scale[(row + i) * G + g]);
        }
    }
    for (int i = 0; i < R; i++)
        store(static_cast<typename T::Store*>(out) + (row + i) * w.N + tile * TILE_N, y[i], w.N - tile * TILE_N);
}

template <class T>
void block_product(const Rows& r, const Weights& w, int threads, void* out) {
    const int64_t tiles = (w.N + 15) / 16;
    parallel(threads, [&](int t, int n) {
        const Span range = partition(tiles, t, n);
        for (int64_t tile = range.begin; tile < range.end; tile++) {
            int64_t row = 0;
            for (; row + 4 <= r.M; row += 4) block_tile<T, 4>(r, w, row, tile, out);
            for (; row < r.M; row++) block_tile<T, 1>(r, w, row, tile, out);
        }
    });
}

}  // namespace
