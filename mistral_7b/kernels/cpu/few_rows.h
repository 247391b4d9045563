// Products of few rows without repacking, as in decode: one load and one instruction per line of weights.
// Without AMX, all products use these, 4 rows at a time.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lines.h"
#include "weights.h"

namespace {

// Prefetch distance in bytes: the fastest measured with two streams in each of two threads.
constexpr int64_t AHEAD = 4096;

// R rows by W tiles of 16 outputs, with int8 codes (128 is zero); the tiles are `stride` bytes apart.
template <int R, int W>
void dot_tiles8(const Rows& r, int64_t row, const uint8_t* codes, int64_t stride, Sums (*out)[W]) {
    Sums s[R][W];  // local, to stay in registers
    for (int i = 0; i < R; i++)
        for (int t = 0; t < W; t++) s[i][t] = zero();
    const int8_t* x = r.q + row * r.Kp;
    for (int64_t k = 0; k < r.Kp; k += 4, codes += LINE) {
        Line line[W];
        for (int t = 0; t < W; t++) {
            __builtin_prefetch(codes + t * stride + AHEAD);
            line[t] = load(codes + t * stride);
        }
        for (int t = 0; t < W; t++)
            for (int i = 0; i < R; i++) s[i][t] = dot8(s[i][t], line[t], x + i * r.Kp + k);
    }
    for (int i = 0; i < R; i++)
        for (int t = 0; t < W; t++) out[i][t] = s[i][t];
}

// The same for int4 codes: the sums of a group, then its multiplier and zero point.
template <int R, int W>
void dot_tiles4(const Rows& r, int64_t row, const uint8_t* codes, int64_t stride, const uint8_t* groups, int64_t group_stride, Sums (*out)[W]) {
    for (int i = 0; i < R; i++)
        for (int t = 0; t < W; t++) out[i][t] = zero();
    const int8_t* x = r.q + row * r.Kp;
    const int64_t G = r.Kp / r.group;
    for (int64_t g = 0; g < G; g++, x += r.group, groups += TILE_N) {
        Sums a[R][W], b[R][W];
        for (int i = 0; i < R; i++)
            for (int t = 0; t < W; t++) a[i][t] = b[i][t] = zero();
        for (int t = 0; t < W; t++) __builtin_prefetch(groups + t * group_stride + AHEAD / 16);
        for (int64_t k = 0; k < r.group; k += 8, codes += LINE) {
            Line line[W];
            for (int t = 0; t < W; t++) {
                __builtin_prefetch(codes + t * stride + AHEAD);
                line[t] = load(codes + t * stride);
            }
            for (int t = 0; t < W; t++)
                for (int i = 0; i < R; i++) {
                    a[i][t] = dot4(a[i][t], low(line[t]), x + i * r.Kp + k);
                    b[i][t] = dot4(b[i][t], high(line[t]), x + i * r.Kp + k + 4);
                }
        }
        for (int i = 0; i < R; i++)
            for (int t = 0; t < W; t++)
                out[i][t] = add_group(out[i][t], add(a[i][t], b[i][t]), groups + t * group_stride, r.sum[(row + i) * G + g]);
    }
}

// Repacks one tile from int4 to int8, inputs begin..end, both multiples of 32.
inline void repack_tile(const Weights& w, int64_t tile, int64_t begin, int64_t end, uint8_t* out) {
    const uint8_t* codes = w.codes + tile * w.Kp * 8 + begin / 8 * LINE;
    const uint8_t* groups = w.groups + tile * (w.Kp / w.group) * TILE_N;
    for (int64_t k = begin; k < end;) {
        const uint8_t* group = groups + k / w.group * TILE_N;
        const Repack repack(group);
        __builtin_prefetch(group + AHEAD / 16);
        for (const int64_t stop = std::min(end, (k / w.group + 1) * w.group); k < stop; k += 8) {
            __builtin_prefetch(codes + AHEAD);
            const Line line = load(codes);
            repack.store(out, low(line));
            repack.store(out + LINE, high(line));
            codes += LINE;
            out += 2 * LINE;
        }
    }
}

constexpr int64_t FEW = 4;  // with more rows, int4 is repacked to int8 first

// Tile `tile` and, with W = 2, tile `tile + distance`. repacked: int8 codes of a single tile, or null.
template <class T, int R, int W>
void few_rows(const Rows& r, const Weights& w, int64_t row, int64_t tile, int64_t distance, const uint8_t* repacked, void* out) {
    Sums s[R][W];
    int32_t v[16];
    const bool is_int8 = repacked || w.bits == 8;
    const int64_t G = r.Kp / r.group, size = w.Kp * TILE_N;  // bytes of an int8 tile
    if (is_int8)
        dot_tiles8<R, W>(r, row, repacked ? repacked : w.codes + tile * size, distance * size, s);
    else
        dot_tiles4<R, W>(r, row, w.codes + tile * size / 2, distance * size / 2, w.groups + tile * G * TILE_N, distance * G * TILE_N, s);
    for (int i = 0; i < R; i++) {
        int32_t sum = 0;
        for (int64_t g = 0; SUBTRACT && is_int8 && g < G; g++) sum += r.sum[(row + i) * G + g];
        for (int t = 0; t < W; t++) {
            store(v, s[i][t]);
            for (auto& n : v) n -= SUBTRACT * sum;
            finish<T>(r, w, row + i, tile + t * distance, v, out);
        }
    }
}

template <class T, int W>
void any_rows(const Rows& r, const Weights& w, int64_t tile, int64_t distance, const uint8_t* repacked, void* out) {
    int64_t row = 0;
    for (; row + FEW <= r.M; row += FEW) few_rows<T, FEW, W>(r, w, row, tile, distance, repacked, out);
    switch (r.M - row) {
        case 3: few_rows<T, 3, W>(r, w, row, tile, distance, repacked, out); break;
        case 2: few_rows<T, 2, W>(r, w, row, tile, distance, repacked, out); break;
        case 1: few_rows<T, 1, W>(r, w, row, tile, distance, repacked, out); break;
        default: break;
    }
}

// The given tiles of out (M, N) = rows w8^T, in one thread, without AMX.
template <class T>
void product_tiles(const Rows& r, const Weights& w, Span tiles, void* out) {
    static thread_local Scratch<uint8_t> repack_scratch;
    uint8_t* repacked = w.bits == 4 && r.M > FEW ? repack_scratch.get(w.Kp * TILE_N) : nullptr;
    int64_t tile = tiles.begin;
    if (!repacked && r.M <= ROWS_BY_TWO) {  // two streams, one per half: prefetches are then always of data used next
        const int64_t half = (tiles.end - tiles.begin) / 2;
        for (; tile < tiles.begin + half; tile++) any_rows<T, 2>(r, w, tile, half, nullptr, out);
        tile += half;
    }
    for (; tile < tiles.end; tile++) {
        if (repacked) repack_tile(w, tile, 0, w.Kp, repacked);
        any_rows<T, 1>(r, w, tile, 0, repacked, out);
    }
}

}  // namespace
