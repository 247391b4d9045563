// Products of rows of activations with weights in block formats: the definition is in weights.h.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lines.h"
#include "weights.h"

namespace {

// Prefetch distance in bytes: the fastest measured with two threads.
constexpr int64_t AHEAD = 4096;
constexpr int PARTS_OF_TILE = TILE_N / LANES;  // registers of outputs

// The codes of quads k and k + 1 of a group, or with a table their values + 128: a line of bytes each.
template <int KIND>
inline void unpack(const uint8_t* low_lines, const Line& plane, int k, Line& a, Line& b) {
    constexpr Format f = format_of(KIND);
    constexpr int mask = ((1 << f.high) - 1) << 4;
    if constexpr (f.low == 8) {
        a = load(low_lines + k * LINE), b = load(low_lines + (k + 1) * LINE);
        return;
    }
    const Line both = load(low_lines + k / 2 * LINE);
    a = low(both), b = high(both);
    if constexpr (f.table) a = lookup(a, TABLE), b = lookup(b, TABLE);
    if constexpr (f.high != 0) a = merge(a, plane, 4 - f.high * k, mask), b = merge(b, plane, 4 - f.high * (k + 1), mask);
}

// R rows in the layout of Rows, one alone or interleaved: element i of row r is at (r / T) * (T * n) + i * T + r % T.
template <int R>
inline int64_t place(int64_t row, int64_t n, int64_t i) {
    constexpr int64_t T = R == 1 ? 1 : TOGETHER;
    return row / T * (T * n) + i * T + row % T;
}

// sums += the products of R rows with a group of P parts of a tile. x: the first row's codes of the group.
template <int KIND, int R, int P>
inline void dot_group(Sums (&sums)[P][R], const uint8_t* low_lines, const uint8_t* high_line, const int8_t* x, int64_t Kp) {
    constexpr Format f = format_of(KIND);
    constexpr int QUADS = f.group / 4, most = most_pairs(f.low + f.high);
    Sums s[P][R];  // local, to stay in registers
    Pairs pairs[P][R];
    Line plane[P]{}, a[P], b[P];
    for (int p = 0; p < P; p++) {
        for (int i = 0; i < R; i++) s[p][i] = sums[p][i];
        if (f.high) plane[p] = load(high_line + p * 4 * LANES);
    }
#pragma GCC unroll 4
    for (int k = 0; k < QUADS; k += 2) {
        for (int p = 0; p < P; p++) unpack<KIND>(low_lines + p * 4 * LANES, plane[p], k, a[p], b[p]);
        for (int i = 0; i < R; i++) {
            const int8_t *at = x + 4 * place<R>(i, Kp / 4, k), *next = x + 4 * place<R>(i, Kp / 4, k + 1);
            for (int p = 0; p < P; p++) {
                if constexpr (f.low == 8 || f.table) {
                    s[p][i] = dot8(dot8(s[p][i], a[p], at), b[p], next);
                } else {
                    if (k % most == 0) pairs[p][i] = begin(s[p][i]);
                    pairs[p][i] = dot4(dot4(pairs[p][i], a[p], at), b[p], next);
                    if ((k + 2) % most == 0 || k + 2 == QUADS) s[p][i] = end(s[p][i], pairs[p][i]);
                }
            }
        }
    }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < R; i++) sums[p][i] = s[p][i];
}

// The integer scales of a part of a tile and a block, four groups a line.
template <int KIND>
struct GroupScales {
    static constexpr Format f = format_of(KIND);
    static constexpr bool six_bits = f.scales == SIX_BITS;
    Line s[six_bits || !f.scales ? 2 : f.scales]{}, t[2]{};
    GroupScales() = default;
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
    Ints of(int64_t g) const {
        const Ints four = words(s[g / 4]);
        return six_bits ? (four >> (8 * (g % 4))) & 255 : (four << (24 - 8 * (g % 4))) >> 24;
    }
    // t of group g, of the formats that have it
    Ints minimum_of(int64_t g) const { return (words(t[g / 4]) >> (8 * (g % 4))) & 255; }
    // sum over groups of t times the sum of codes, given in parts (weights.h): t has 6 bits
    Ints minima(const int8_t* parts) const {
        const Sums none = zero();
        const Sums high_parts = end(none, dot4(dot4(begin(none), t[0], parts), t[1], parts + 8));
        return words(high_parts) * 128 + words(end(none, dot4(dot4(begin(none), t[0], parts + 4), t[1], parts + 12)));
    }
};

// y += a block's integer sum times the scales of its tile, and the minima. R: rows of a call, for their layout.
template <int KIND, int R>
inline void add_block(const Rows& r, int64_t row, int64_t b, Ints total, Floats scale, Floats minimum, const GroupScales<KIND>& scales, Floats& y) {
    constexpr Format f = format_of(KIND);
    const float sx = r.scale[place<R>(row, r.blocks, b)];
    y += __builtin_convertvector(total, Floats) * (scale * sx);
    if constexpr (f.minimum && f.scales != 0)
        y -= __builtin_convertvector(scales.minima(r.parts + place<R>(row, r.blocks, b) * PARTS), Floats) * (minimum * sx);
    else if constexpr (f.minimum)
        y += float(r.sum[place<R>(row, r.Kp / r.group, b * (f.block / r.group))]) * (minimum * sx);
}

// y += R rows by one tile and one block of `groups` groups, whose record is at `codes`.
template <int KIND, int R>
__attribute__((always_inline)) inline void inlined_record(const Rows& r, int64_t b, int64_t groups, const uint8_t* codes, const uint16_t* d, Floats (&y)[PARTS_OF_TILE][R]) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t LOW = f.group * TILE_N * f.low / 8, HIGH = f.group * TILE_N * f.high / 8, GROUPS = f.block / f.group;
    constexpr int32_t offset = (f.low == 8 || f.table) ? f.zero - 128 + SUBTRACT : f.zero;
    const int64_t G = r.Kp / r.group, in_group = f.group / r.group;
    constexpr int64_t T = R == 1 ? 1 : TOGETHER;
    constexpr int P = PARTS_OF_TILE == 2 ? 2 : 1;  // parts that share each load of x
    const int8_t* x = r.q + b * f.block * T;
    const int32_t* sum = r.sum + b * (f.block / r.group) * T;
    const uint8_t* ahead = codes + AHEAD;  // prefetched group by group: a whole record at once would fill the queue of loads
    for (int64_t i = 0; i < scale_lines(f, GROUPS); i++, ahead += LINE) __builtin_prefetch(ahead);
    for (int part = 0; part < PARTS_OF_TILE; part += P, codes += P * 4 * LANES, d += P * LANES) {
        GroupScales<KIND> scales[P];
        for (int p = 0; p < P; p++) scales[p] = {codes + groups * (LOW + HIGH) + p * 4 * LANES, groups};
        Ints total[P][R] = {};
        for (int64_t g = 0; g < (GROUPS == 1 ? 1 : groups); g++) {
            if (part == 0)
                for (int64_t i = 0; i < LOW + HIGH; i += LINE, ahead += LINE) __builtin_prefetch(ahead);
            Sums s[P][R];
            for (int i = 0; i < R; i++) {
                int32_t from = 0;
                if constexpr (offset != 0)
                    for (int64_t j = 0; j < in_group; j++) from -= offset * sum[place<R>(i, G, g * in_group + j)];
                for (int p = 0; p < P; p++) s[p][i] = start(from);
            }
            dot_group<KIND, R, P>(s, codes + g * LOW, codes + groups * LOW + g * HIGH, x + g * f.group * T, r.Kp);
            for (int p = 0; p < P; p++) {
                if constexpr (f.scales != 0) {
                    const Ints scale = scales[p].of(g);
                    for (int i = 0; i < R; i++) total[p][i] += words(s[p][i]) * scale;
                } else {
                    for (int i = 0; i < R; i++) total[p][i] = words(s[p][i]);
                }
            }
        }
        for (int p = 0; p < P; p++) {
            const Floats scale = halves(d + p * LANES), minimum = f.minimum ? halves(d + p * LANES + TILE_N) : Floats{};
            for (int i = 0; i < R; i++) add_block<KIND, R>(r, i, b, total[p][i], scale, minimum, scales[p], y[part + p][i]);
        }
    }
}

template <int KIND, int R>
__attribute__((noinline)) void called_record(const Rows& r, int64_t b, int64_t groups, const uint8_t* codes, const uint16_t* d, Floats (&y)[PARTS_OF_TILE][R]) {
    inlined_record<KIND, R>(r, b, groups, codes, d, y);
}

// With short blocks, y stays in registers from block to block if there are 32; with 16, other values would be spilled.
template <int KIND, int R>
inline void block_record(const Rows& r, int64_t b, int64_t groups, const uint8_t* codes, const uint16_t* d, Floats (&y)[PARTS_OF_TILE][R]) {
    constexpr Format f = format_of(KIND);
    if constexpr (LANES == 16 && f.block == f.group)
        inlined_record<KIND, R>(r, b, groups, codes, d, y);
    else
        called_record<KIND, R>(r, b, groups, codes, d, y);
}

// The first R rows by one tile, over all blocks: out (R, 16).
template <int KIND, int R>
void block_tile(const Rows& r, const Weights& w, int64_t tile, float* out) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t D = (1 + f.minimum) * TILE_N;
    const uint8_t* codes = w.codes + tile * tile_bytes(f, w.Kp);
    const uint16_t* d = w.d + tile * r.blocks * D;
    const int64_t whole = w.Kp / f.block;
    Floats y[PARTS_OF_TILE][R] = {};
    for (int64_t b = 0; b < whole; b++, codes += record_bytes(f, f.block), d += D) block_record<KIND, R>(r, b, f.block / f.group, codes, d, y);
    if (f.block > f.group && whole < r.blocks) block_record<KIND, R>(r, whole, (w.Kp - whole * f.block) / f.group, codes, d, y);
    for (int i = 0; i < R; i++)
        for (int part = 0; part < PARTS_OF_TILE; part++) std::memcpy(out + i * TILE_N + part * LANES, &y[part][i], sizeof(Floats));
}

constexpr int MANY = TOGETHER;                // rows at a time
constexpr int MOST = LANES == 16 ? 8 : MANY;  // and with 32 registers

template <int KIND, class T>
void block_rows(const Rows& r, const Weights& w, int64_t tile, void* out) {
    for (int64_t row = 0; row < r.M;) {
        alignas(64) float y[MOST * TILE_N];
        const int64_t left = r.M - row, rows = r.M == 1 ? 1 : left <= MANY ? MANY : MOST;  // rows beyond M are padding
        if (rows == 1)
            block_tile<KIND, 1>(r.from(row), w, tile, y);
        else if (rows == MANY)
            block_tile<KIND, MANY>(r.from(row), w, tile, y);
        else
            block_tile<KIND, MOST>(r.from(row), w, tile, y);
        for (int64_t i = 0; i < std::min(rows, left); i++)
            store(static_cast<typename T::Store*>(out) + (row + i) * w.N + tile * TILE_N, load(y + i * TILE_N), w.N - tile * TILE_N);
        row += rows;
    }
}

}  // namespace
