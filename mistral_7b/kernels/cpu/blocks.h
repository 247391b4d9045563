// Products of rows of activations with weights in block formats: the definition is in weights.h.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lines.h"
#include "weights.h"

namespace {

// Prefetch distance in bytes: the fastest measured with two threads.
constexpr int64_t AHEAD = 4096;

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
    Pairs pairs[R];
#pragma GCC unroll 4
    for (int k = 0; k < QUADS; k += 2) {
        const Line both = load(low_lines + k / 2 * LINE);
        Line a = low(both), b = high(both);
        if constexpr (f.table) {
            a = lookup(a, TABLE), b = lookup(b, TABLE);
            for (int i = 0; i < R; i++) s[i] = dot8(dot8(s[i], a, x + i * stride + 4 * k), b, x + i * stride + 4 * k + 4);
        } else {
            constexpr int mask = ((1 << f.high) - 1) << 4, most = most_pairs(f.low + f.high);
            if constexpr (f.high != 0) a = merge(a, plane, 4 - f.high * k, mask), b = merge(b, plane, 4 - f.high * (k + 1), mask);
            for (int i = 0; i < R; i++) {
                if (k % most == 0) pairs[i] = begin(s[i]);
                pairs[i] = dot4(dot4(pairs[i], a, x + i * stride + 4 * k), b, x + i * stride + 4 * k + 4);
                if ((k + 2) % most == 0 || k + 2 == QUADS) s[i] = end(s[i], pairs[i]);
            }
        }
    }
}

// The integer scales of a tile and a block, four groups a line.
template <int KIND>
struct GroupScales {
    static constexpr Format f = format_of(KIND);
    static constexpr bool six_bits = f.scales == SIX_BITS;
    Line s[six_bits || !f.scales ? 2 : f.scales]{}, t[2]{};
    GroupScales(const uint8_t* lines, int64_t groups) {
        if constexpr (six_bits) {
            const Line first = load(lines), second = load(lines + LINE);
            s[0] = masked(first, 63), t[0] = masked(second, 63);
            if (groups > 4) {
                const Line rest = load(lines + 2 * LINE);
                s[1] = merge(low(rest), first, -2, 48), t[1] = merge(high(rest), second, -2, 48);
            }
        } else {
            for (int i = 0; i < f.scales && 4 * i < groups; i++) s[i] = load(lines + i * LINE);
        }
    }
    I16 of(int g) const {
        const I16 four = words(s[g / 4]);
        return six_bits ? (four >> (8 * (g % 4))) & 255 : (four << (24 - 8 * (g % 4))) >> 24;
    }
    // sum over groups of t times the sum of codes, given in parts (weights.h): t has 6 bits
    I16 minima(const int8_t* parts) const {
        const Sums none = zero();
        const Sums high_parts = end(none, dot4(dot4(begin(none), t[0], parts), t[1], parts + 8));
        return lanes(high_parts) * 128 + lanes(end(none, dot4(dot4(begin(none), t[0], parts + 4), t[1], parts + 12)));
    }
};

// y += a block's integer sum times the scales of its tile, and the minima.
template <int KIND>
inline void add_block(const Rows& r, int64_t row, int64_t b, I16 total, F16 scale, F16 minimum, const GroupScales<KIND>& scales, F16& y) {
    constexpr Format f = format_of(KIND);
    const float sx = r.scale[row * r.blocks + b];
    y += __builtin_convertvector(total, F16) * (scale * sx);
    if constexpr (f.minimum && f.scales != 0)
        y -= __builtin_convertvector(scales.minima(r.parts + (row * r.blocks + b) * PARTS), F16) * (minimum * sx);
    else if constexpr (f.minimum)
        y += float(r.sum[row * (r.Kp / r.group) + b * (f.block / r.group)]) * (minimum * sx);
}

// y += R rows by one tile and one block of `groups` groups, whose record is at `codes`.
template <int KIND, int R>
inline void block_record(const Rows& r, int64_t row, int64_t b, int64_t groups, const uint8_t* codes, const uint16_t* d, F16 (&y)[R]) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t LOW = f.group * TILE_N * f.low / 8, HIGH = f.group * TILE_N * f.high / 8, GROUPS = f.block / f.group;
    constexpr int64_t STEP = record_bytes(f, f.block) / GROUPS;
    const int64_t G = r.Kp / r.group, in_group = f.group / r.group;
    const int8_t* x = r.q + row * r.Kp + b * f.block;
    const int32_t* sum = r.sum + row * G + b * (f.block / r.group);
    const GroupScales<KIND> scales(codes + groups * (LOW + HIGH), groups);
    I16 total[R] = {};
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t i = 0; i < STEP; i += LINE) __builtin_prefetch(codes + g * STEP + i + AHEAD);
        Sums s[R];
        for (int i = 0; i < R; i++) {
            constexpr int32_t offset = (f.low == 8 || f.table) ? f.zero - 128 + SUBTRACT : f.zero;
            int32_t from = 0;
            if constexpr (offset != 0)
                for (int64_t j = 0; j < in_group; j++) from -= offset * sum[i * G + g * in_group + j];
            s[i] = start(from);
        }
        dot_group<KIND, R>(s, codes + g * LOW, codes + groups * LOW + g * HIGH, x + g * f.group, r.Kp);
        if constexpr (f.scales != 0) {
            const I16 scale = scales.of(g);
            for (int i = 0; i < R; i++) total[i] += lanes(s[i]) * scale;
        } else {
            for (int i = 0; i < R; i++) total[i] = lanes(s[i]);
        }
    }
    const F16 scale = from_halves(d), minimum = f.minimum ? from_halves(d + TILE_N) : F16{};
    for (int i = 0; i < R; i++) add_block<KIND>(r, row + i, b, total[i], scale, minimum, scales, y[i]);
}

// R rows by one tile, over all blocks.
template <int KIND, int R>
void block_tile(const Rows& r, const Weights& w, int64_t row, int64_t tile, F16* out) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t D = (1 + f.minimum) * TILE_N;
    const uint8_t* codes = w.codes + tile * tile_bytes(f, w.Kp);
    const uint16_t* d = w.d + tile * r.blocks * D;
    const int64_t whole = w.Kp / f.block;
    F16 y[R] = {};
    for (int64_t b = 0; b < whole; b++, codes += record_bytes(f, f.block), d += D) block_record<KIND, R>(r, row, b, f.block / f.group, codes, d, y);
    if (whole < r.blocks) block_record<KIND, R>(r, row, whole, (w.Kp - whole * f.block) / f.group, codes, d, y);
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

}  // namespace
