// Products with weights in GGUF's block formats.
//
// A row of inputs is divided into blocks of 32 or 256, each with float16 scales d and m. A block of 256 is divided into
// groups, which have integer scales s and t. A weight is, with its code q, at most 8 bits of `low` and `high`:
//
//   Q8_0   Q4_0   Q5_0   d (q - zero)                Q4_K   Q5_K   (d s) q - (m t)         s, t 0..63
//   Q4_1   Q5_1          d q + m                     Q6_K          (d s) (q - 32)          s int8
//   IQ4_NL               d TABLE[q]                  IQ4_XS        (d s) TABLE[q]          s -32..31, as int8
//
// The record of a tile (16 outputs) and a block is lines of 64 bytes, so a weight has the bits it has in the file:
//
//   low      codes of 8 bits: 4 inputs a line; of 4 bits: 8 inputs a line, as in weights.h
//   high     a fifth bit: 32 inputs a line, bit i of byte (n, j) is that of input 4i + j
//            a fifth and a sixth: 16 inputs a line, bits 2i and 2i + 1 of byte (n, j) are those of input 4i + j
//   scales   byte (n, j) of line i: s of group 4i + j, int8; for Q4_K and Q5_K byte 4i + j of the file's 12 bytes
//
// Records are contiguous: codes[N/16][K/block][record]. The scales follow apart: d[N/16][K/block][16], with a minimum
// [N/16][K/block][2][16].
//
// Activations have a scale sx per block. The products with a group are summed as integers, times s, over the block:
//
//   y = sum over blocks, in order: float(sum_g s_g sum_k xq[k] (q[k] - zero)) (d sx), -+ float(sum_g t_g sum_k xq[k]) (m sx)
//
// Integer sums are exact, so the result is the same with all instruction sets and for any number of rows.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lines.h"
#include "weights.h"
#include "few_rows.h"

namespace {

struct Format {
    int block, group, low, high;  // inputs of a block and of a group, bits of a code
    int scales;                   // lines of integer scales in a record; SIX_BITS: 6-bit s and t
    int zero;                     // subtracted from the codes
    bool minimum, table;
};

constexpr int SIX_BITS = 3;

// The formats by GGUF's numbers. Mirrored in block_formats.py.
constexpr Format format_of(int kind) {
    switch (kind) {
        case 2: return {32, 32, 4, 0, 0, 8, false, false};              // Q4_0
        case 3: return {32, 32, 4, 0, 0, 0, true, false};               // Q4_1
        case 6: return {32, 32, 4, 1, 0, 16, false, false};             // Q5_0
        case 7: return {32, 32, 4, 1, 0, 0, true, false};               // Q5_1
        case 8: return {32, 32, 8, 0, 0, SUBTRACT, false, false};       // Q8_0
        case 12: return {256, 32, 4, 0, SIX_BITS, 0, true, false};      // Q4_K
        case 13: return {256, 32, 4, 1, SIX_BITS, 0, true, false};      // Q5_K
        case 14: return {256, 16, 4, 2, 4, 32, false, false};           // Q6_K
        case 20: return {32, 32, 4, 0, 0, SUBTRACT, false, true};       // IQ4_NL
        case 23: return {256, 32, 4, 0, 2, SUBTRACT, false, true};      // IQ4_XS
        default: return {};
    }
}

constexpr int64_t record_bytes(const Format& f) { return f.block * TILE_N * (f.low + f.high) / 8 + f.scales * LINE; }

// 128 + the values of IQ4_NL and IQ4_XS.
alignas(16) constexpr uint8_t TABLE[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

// s += the products of R rows, `stride` bytes apart, with a group of a tile.
template <int KIND, int R>
inline void dot_group(Sums (&s)[R], const uint8_t* low_lines, const uint8_t* high_line, const int8_t* x, int64_t stride) {
    constexpr Format f = format_of(KIND);
    constexpr int QUADS = f.group / 4;
    if constexpr (f.low == 8) {
        for (int k = 0; k < QUADS; k++) {
            const Line line = load(low_lines + k * LINE);
            for (int i = 0; i < R; i++) s[i] = dot8(s[i], line, x + i * stride + 4 * k);
        }
        return;
    }
    Line plane{};
    if (f.high) plane = load(high_line);
#pragma GCC unroll 4
    for (int k = 0; k < QUADS; k += 2) {
        const Line both = load(low_lines + k / 2 * LINE);
        Line a = low(both), b = high(both);
        if constexpr (f.table) {
            a = lookup(a, TABLE), b = lookup(b, TABLE);
            for (int i = 0; i < R; i++) s[i] = dot8(dot8(s[i], a, x + i * stride + 4 * k), b, x + i * stride + 4 * k + 4);
        } else {
            constexpr int mask = ((1 << f.high) - 1) << 4;
            if constexpr (f.high != 0) a = merge(a, plane, 4 - f.high * k, mask), b = merge(b, plane, 4 - f.high * (k + 1), mask);
            for (int i = 0; i < R; i++) s[i] = dot4(dot4(s[i], a, x + i * stride + 4 * k), b, x + i * stride + 4 * k + 4);
        }
    }
}

// The integer scales of a tile and a block, four groups a line.
template <int KIND>
struct GroupScales {
    static constexpr Format f = format_of(KIND);
    static constexpr bool six_bits = f.scales == SIX_BITS;
    Line s[six_bits || !f.scales ? 2 : f.scales], t[2];
    explicit GroupScales(const uint8_t* lines) {
        if constexpr (six_bits) {
            const Line first = load(lines), second = load(lines + LINE), rest = load(lines + 2 * LINE);
            s[0] = masked(first, 63), s[1] = merge(low(rest), first, -2, 48);
            t[0] = masked(second, 63), t[1] = merge(high(rest), second, -2, 48);
        } else {
            for (int i = 0; i < f.scales; i++) s[i] = load(lines + i * LINE);
        }
    }
    I16 of(int g) const {
        const I16 four = words(s[g / 4]);
        return six_bits ? (four >> (8 * (g % 4))) & 255 : (four << (24 - 8 * (g % 4))) >> 24;
    }
    // sum over groups of t times the sum of codes, given in parts (weights.h)
    I16 minima(const int8_t* parts) const {
        const Sums high_parts = dot4(dot4(zero(), t[0], parts), t[1], parts + 8);
        return lanes(high_parts) * 128 + lanes(dot4(dot4(zero(), t[0], parts + 4), t[1], parts + 12));
    }
};

// R rows by one tile, over all blocks.
template <int KIND, int R>
void block_tile(const Rows& r, const Weights& w, int64_t row, int64_t tile, F16* out) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t LOW = f.group * TILE_N * f.low / 8, HIGH = f.group * TILE_N * f.high / 8, GROUPS = f.block / f.group;
    constexpr int64_t RECORD = record_bytes(f), SCALES = GROUPS * (LOW + HIGH), D = (1 + f.minimum) * TILE_N;
    const int64_t B = w.Kp / f.block, G = w.Kp / r.group, in_group = f.group / r.group;
    const uint8_t* codes = w.codes + tile * B * RECORD;
    const uint16_t* d = w.d + tile * B * D;
    F16 y[R] = {};
    for (int64_t b = 0; b < B; b++, codes += RECORD, d += D) {
        const int8_t* x = r.q + row * r.Kp + b * f.block;
        const int32_t* sum = r.sum + row * G + b * (f.block / r.group);
        const GroupScales<KIND> scales(codes + SCALES);
        I16 total[R] = {};
        for (int64_t g = 0; g < GROUPS; g++) {
            for (int64_t i = 0; i < RECORD / GROUPS; i += LINE) __builtin_prefetch(codes + g * (RECORD / GROUPS) + i + AHEAD);
            Sums s[R];
            for (int i = 0; i < R; i++) {
                int32_t offset = 0;
                if constexpr (f.zero != 0)
                    for (int64_t j = 0; j < in_group; j++) offset -= f.zero * sum[i * G + g * in_group + j];
                s[i] = start(offset);
            }
            dot_group<KIND, R>(s, codes + g * LOW, codes + GROUPS * LOW + g * HIGH, x + g * f.group, r.Kp);
            if constexpr (f.scales != 0) {
                const I16 scale = scales.of(g);
                for (int i = 0; i < R; i++) total[i] += lanes(s[i]) * scale;
            } else {
                for (int i = 0; i < R; i++) total[i] = lanes(s[i]);
            }
        }
        const F16 scale = from_halves(d);
        for (int i = 0; i < R; i++) {
            const float sx = r.scale[(row + i) * B + b];
            y[i] += __builtin_convertvector(total[i], F16) * (scale * sx);
            if constexpr (f.minimum) {
                const F16 m = from_halves(d + TILE_N) * sx;
                if constexpr (f.scales != 0)
                    y[i] -= __builtin_convertvector(scales.minima(r.parts + ((row + i) * B + b) * PARTS), F16) * m;
                else
                    y[i] += float(sum[i * G]) * m;
            }
        }
    }
    for (int i = 0; i < R; i++) out[i] = y[i];
}

constexpr int MANY = 4;  // rows at a time

template <int KIND, class T>
void block_rows(const Rows& r, const Weights& w, int64_t tile, void* out) {
    for (int64_t row = 0; row < r.M;) {
        F16 y[MANY];
        const int64_t left = r.M - row, rows = left == 1 ? 1 : MANY;  // rows beyond M are padding
        left == 1 ? block_tile<KIND, 1>(r, w, row, tile, y) : block_tile<KIND, MANY>(r, w, row, tile, y);
        for (int64_t i = 0; i < std::min(rows, left); i++)
            store(static_cast<typename T::Store*>(out) + (row + i) * w.N + tile * TILE_N, y[i], w.N - tile * TILE_N);
        row += rows;
    }
}

// The given tiles of out (M, N), in one thread.
template <class T>
void block_tiles(const Rows& r, const Weights& w, Span tiles, void* out) {
    for (int64_t tile = tiles.begin; tile < tiles.end; tile++) {
        switch (w.kind) {
            case 2: block_rows<2, T>(r, w, tile, out); break;
            case 3: block_rows<3, T>(r, w, tile, out); break;
            case 6: block_rows<6, T>(r, w, tile, out); break;
            case 7: block_rows<7, T>(r, w, tile, out); break;
            case 8: block_rows<8, T>(r, w, tile, out); break;
            case 12: block_rows<12, T>(r, w, tile, out); break;
            case 13: block_rows<13, T>(r, w, tile, out); break;
            case 14: block_rows<14, T>(r, w, tile, out); break;
            case 20: block_rows<20, T>(r, w, tile, out); break;
            case 23: block_rows<23, T>(r, w, tile, out); break;
            default: break;
        }
    }
}

}  // namespace
