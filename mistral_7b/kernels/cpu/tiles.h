// Products of more than MANY rows on the matrix unit, bit-identical to those of blocks.h.
//
// Codes of 256 inputs, a chunk, by WIDTH tiles of outputs are unpacked to bytes once for up to STRIP rows, in a panel of
// the L1 cache. From it, a unit is computed at a time, 16 rows by one or two tiles: its integer sums by the matrix unit,
// which are stored, and then, while the matrix unit computes the next ones, the floats y on vectors, as add_block does.
//
// Blocks of 32 inputs have a sum each: a tile is half a product. Blocks of 256 have one sum too, because the integer
// scales are multiplied into the codes. They are split into digits, so that the products fit in a byte, a plane of bytes
// for each digit, the highest first. So the sum is exact, and there is no work per group:
//
//   Q4_K, Q5_K   s = 8 h + l            h, l in 0..7                s q <= 7 * 31 = 217: unsigned bytes
//   Q6_K         s = 8 (8 a + b) + c    a in -2..2, b, c in -3..4   s (q - 32) in -128..124: signed bytes
//
// The values of IQ4_XS have 8 bits already, so it is left to blocks.h.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "blocks.h"

namespace {

#if defined(WITH_TILES)

static_assert(LANES == TILE_N, "a line is one register");

constexpr int64_t CHUNK = 256, STRIP = 512, PLANE = CHUNK * TILE_N;  // inputs, rows, bytes of a plane

constexpr bool on_tiles(const Format& f) { return !(f.table && f.scales); }
constexpr int64_t planes(const Format& f) { return f.scales == 0 ? 1 : f.scales == SIX_BITS ? 2 : 3; }
constexpr int64_t unit_tiles(const Format& f) { return planes(f) == 2 ? 2 : 1; }  // four sums in progress hide their latency
constexpr int64_t most_tiles(const Format& f) { return planes(f) == 3 ? 2 : 4; }  // WIDTH: at most 32 KB in a panel

struct alignas(64) TileScratch {
    uint8_t panel[8 * PLANE];
    int32_t sums[2][8 * TILE_N * 16];  // of two units: for each block or plane (16 rows, 16 outputs)
    float y[STRIP * 4 * TILE_N];       // (rows, WIDTH, 16)
};

TileScratch& tile_scratch() {
    static thread_local Scratch<TileScratch> scratch;
    return *scratch.get(1);
}

// A digit of the integer scales of 16 outputs. Codes are multiplied by its magnitude as words, two at once: their
// products are at most 63 * 4 or 31 * 7, so that none carries into the next byte.
struct Digit {
    W32 size;
    B64 sign, offset;  // 255 if it is negative, which inverts bits; subtracted afterwards: `sign`, and digit * zero
};

// Splits scales into digits, the highest first.
template <int KIND, int64_t P>
void split(Ints s, Digit (&digits)[P]) {
    using U16 = uint32_t __attribute__((vector_size(64)));
    constexpr Format f = format_of(KIND);
    constexpr int least = f.zero ? 3 : 0;
    for (int64_t p = P - 1; p >= 0; p--) {
        const Ints digit = p ? ((s + least) & 7) - least : s, size = digit < 0 ? -digit : digit;
        const U16 offset = (reinterpret_cast<U16>(digit * f.zero) & 255) * 0x01010101u;
        const B64 sign = reinterpret_cast<B64>(digit < 0);
        digits[p] = {reinterpret_cast<W32>(size | size << 16), sign, sign + reinterpret_cast<B64>(offset)};
        s = (s - digit) >> 3;
    }
}

// Unpacks the record of a block to `to`: its lines in the order of inputs, in each plane.
template <int KIND>
void unpack_record(const uint8_t* record, int64_t groups, uint8_t* to) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t LOW = f.group * TILE_N * f.low / 8, HIGH = f.group * TILE_N * f.high / 8, P = planes(f);
    constexpr uint8_t zero = f.table ? 128 : f.zero;
    const GroupScales<KIND> scales(record + groups * (LOW + HIGH), groups);
    for (int64_t i = 0; i < record_bytes(f, groups * f.group); i += LINE) __builtin_prefetch(record + i + AHEAD);
    for (int64_t g = 0; g < groups; g++) {
        Line plane{}, two[2];
        if (f.high) plane = load(record + groups * LOW + g * HIGH);
        Digit digits[P];
        if constexpr (f.scales != 0) split<KIND>(scales.of(g), digits);
        for (int k = 0; k < f.group / 4; k += 2) {
            unpack<KIND>(record + g * LOW, plane, k, two[0], two[1]);
            for (int j = 0; j < 2; j++, to += LINE) {
                const B64 codes = reinterpret_cast<B64>(words(two[j]));
                for (int64_t p = 0; p < P; p++) {
                    B64 bytes = codes - zero;
                    if constexpr (f.scales != 0) bytes = reinterpret_cast<B64>(reinterpret_cast<W32>(codes) * digits[p].size);
                    if constexpr (f.scales != 0 && f.zero != 0) bytes = (bytes ^ digits[p].sign) - digits[p].offset;
                    std::memcpy(to + p * PLANE, &bytes, LINE);
                }
            }
        }
    }
}

// Unpacks the records of up to a chunk of inputs. With blocks of 256, the last product of 64 inputs is padded with zeros.
template <int KIND>
void unpack_chunk(const uint8_t* record, int64_t inputs, uint8_t* panel) {
    constexpr Format f = format_of(KIND);
    for (int64_t k = 0; k < inputs; k += f.block, record += record_bytes(f, f.block))
        unpack_record<KIND>(record, std::min(int64_t(f.block), inputs - k) / f.group, panel + k * TILE_N);
    for (int64_t p = 0; inputs % 64 && p < planes(f); p++) std::memset(panel + p * PLANE + inputs * TILE_N, 0, 32 * TILE_N);
}

// Sums are in tiles 0..3, each 256 int32.
inline void clear_sums() {
    zero_tile(0);
    zero_tile(1);
    zero_tile(2);
    zero_tile(3);
}
inline void store_sums(int32_t* sums, int64_t count) {
    store_tile(0, sums, 64);
    store_tile(1, sums + 256, 64);
    store_tile(2, sums + 512, 64);
    if (count == 4) store_tile(3, sums + 768, 64);
}

// sums[b] = 16 rows by block b of 32 inputs, for the 8 blocks of a chunk. Those beyond a short one are not used.
inline void dot_blocks(const int8_t* x, int64_t stride, const uint8_t* panel, int32_t* sums) {
    fence();
    for (int b = 0; b < 8; b += 4, x += 128, panel += 2048, sums += 1024) {
        clear_sums();
        load_tile(4, x, stride);
        load_tile(6, panel, LINE);
        dot_signed(0, 4, 6);
        load_tile(5, x + 32, stride);
        load_tile(7, panel + 512, LINE);
        dot_signed(1, 5, 7);
        load_tile(4, x + 64, stride);
        load_tile(6, panel + 1024, LINE);
        dot_signed(2, 4, 6);
        load_tile(5, x + 96, stride);
        load_tile(7, panel + 1536, LINE);
        dot_signed(3, 5, 7);
        store_sums(sums, 4);
    }
    fence();
}

// sums[p] = 16 rows by plane p, for the 2 planes of each of two tiles.
inline void dot_two_tiles(const int8_t* x, int64_t stride, const uint8_t* panel, int64_t inputs, int32_t* sums) {
    fence();
    clear_sums();
    for (int64_t k = 0; k < inputs; k += 64, panel += 1024) {
        load_tile(4, x + k, stride);
        load_tile(6, panel, LINE);
        dot_unsigned(0, 4, 6);
        load_tile(7, panel + PLANE, LINE);
        dot_unsigned(1, 4, 7);
        load_tile(6, panel + 2 * PLANE, LINE);
        dot_unsigned(2, 4, 6);
        load_tile(7, panel + 3 * PLANE, LINE);
        dot_unsigned(3, 4, 7);
    }
    store_sums(sums, 4);
    fence();
}

// sums[p] = 16 rows by plane p, for the 3 planes of a tile.
inline void dot_three_planes(const int8_t* x, int64_t stride, const uint8_t* panel, int64_t inputs, int32_t* sums) {
    fence();
    clear_sums();
    for (int64_t k = 0; k < inputs; k += 64, panel += 1024) {
        load_tile(4, x + k, stride);
        load_tile(6, panel, LINE);
        dot_signed(0, 4, 6);
        load_tile(7, panel + PLANE, LINE);
        dot_signed(1, 4, 7);
        load_tile(6, panel + 2 * PLANE, LINE);
        dot_signed(2, 4, 6);
    }
    store_sums(sums, 3);
    fence();
}

// The sums of a unit, at the first of its tiles in the panel.
template <int KIND>
void dot_unit(const int8_t* x, int64_t stride, const uint8_t* panel, int64_t inputs, int32_t* sums) {
    constexpr int64_t P = planes(format_of(KIND));
    if constexpr (P == 1)
        dot_blocks(x, stride, panel, sums);
    else if constexpr (P == 2)
        dot_two_tiles(x, stride, panel, inputs, sums);
    else
        dot_three_planes(x, stride, panel, inputs, sums);
}

// y (rows, 16) of one tile, `stride` floats apart, += the blocks of a chunk at input k, of which `sums` has the sums.
template <int KIND>
void add_chunk(const Rows& r, Span rows, const uint8_t* record, const uint16_t* d, int64_t k, int64_t inputs, const int32_t* sums, float* y, int64_t stride) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t D = (1 + f.minimum) * TILE_N, BLOCKS = CHUNK / f.block;
    const int64_t blocks = BLOCKS == 1 ? 1 : inputs / f.block, first = k / f.block, groups = inputs / f.group;
    const GroupScales<KIND> scales(record + groups * f.group * TILE_N * (f.low + f.high) / 8, groups);  // if there are any
    Floats scale[BLOCKS], minimum[BLOCKS];
    for (int64_t b = 0; b < blocks; b++) {
        scale[b] = halves(d + (first + b) * D);
        minimum[b] = f.minimum ? halves(d + (first + b) * D + TILE_N) : Floats{};
    }
    for (int64_t m = rows.begin; m < rows.end; m++, y += stride, sums += TILE_N) {
        Floats sum = floats(y);
        for (int64_t b = 0; b < blocks; b++) {
            Ints total{};
            for (int64_t p = 0; p < planes(f); p++) total = total * 8 + ints(sums + (b + p) * 16 * TILE_N);
            add_block<KIND, 1>(r, m, first + b, total, scale[b], minimum[b], scales, sum);
        }
        std::memcpy(y, &sum, sizeof sum);
    }
}

// The given rows, up to STRIP, by the given tiles, up to WIDTH.
template <int KIND, class T>
void tile_strip(const Rows& r, const Weights& w, Span rows, Span tiles, TileScratch& scratch, void* out) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t P = planes(f), TILES = unit_tiles(f), SUMS = P * 16 * TILE_N, D = (1 + f.minimum) * TILE_N;
    constexpr int64_t stride = most_tiles(f) * TILE_N, chunk_bytes = CHUNK / f.block * record_bytes(f, f.block);
    const int64_t width = tiles.end - tiles.begin, across = (width + TILES - 1) / TILES;
    const int64_t units = (rows.end - rows.begin + 15) / 16 * across, bytes = tile_bytes(f, w.Kp);
    std::fill_n(scratch.y, (rows.end - rows.begin) * stride, 0.0f);
    const uint8_t* record = w.codes + tiles.begin * bytes;
    for (int64_t k = 0; k < w.Kp; k += CHUNK, record += chunk_bytes) {
        const int64_t inputs = std::min(CHUNK, w.Kp - k);
        for (int64_t t = 0; t < width; t++) unpack_chunk<KIND>(record + t * bytes, inputs, scratch.panel + t * P * PLANE);
        const auto dot = [&](int64_t unit) {
            const int8_t* x = r.q + (rows.begin + unit / across * 16) * r.Kp + k;
            dot_unit<KIND>(x, r.Kp, scratch.panel + unit % across * TILES * P * PLANE, inputs, scratch.sums[unit % 2]);
        };
        const auto add = [&](int64_t unit) {
            const int64_t m = unit / across * 16, first = unit % across * TILES;
            const Span some{rows.begin + m, std::min(rows.begin + m + 16, rows.end)};
            for (int64_t t = first; t < std::min(first + TILES, width); t++)
                add_chunk<KIND>(r, some, record + t * bytes, w.d + (tiles.begin + t) * r.blocks * D, k, inputs,
                                scratch.sums[unit % 2] + (t - first) * SUMS, scratch.y + m * stride + t * TILE_N, stride);
        };
        dot(0);
        for (int64_t unit = 0; unit < units; unit++) {
            if (unit + 1 < units) dot(unit + 1);
            add(unit);
        }
    }
    for (int64_t m = rows.begin; m < rows.end; m++)
        for (int64_t t = 0; t < width; t++) {
            const int64_t n = (tiles.begin + t) * TILE_N;
            store(static_cast<typename T::Store*>(out) + m * w.N + n, load(scratch.y + (m - rows.begin) * stride + t * TILE_N), w.N - n);
        }
}

// The given tiles of out (M, N), in one thread.
template <int KIND, class T>
void tile_rows(const Rows& r, const Weights& w, Span tiles, void* out) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t WIDTH = most_tiles(f);
    TileScratch& scratch = tile_scratch();
    configure_tiles(f.block == 32 ? 32 : 64);
    for (int64_t t = tiles.begin; t < tiles.end; t += WIDTH)
        for (int64_t m = 0; m < r.M; m += STRIP)
            tile_strip<KIND, T>(r, w, {m, std::min(m + STRIP, r.M)}, {t, std::min(t + WIDTH, tiles.end)}, scratch, out);
    release_tiles();
}

#endif

}  // namespace
