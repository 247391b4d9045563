// The matrix unit of AMX, where the compiler flags enable it: attention and products of many rows use it.
//
// It has eight tiles of 16 rows of 64 bytes. A product adds to a tile of 16 x 16 int32 that of a tile of int8 (16 rows by
// 64 inputs) and a tile of bytes (16 lines of formats.h: 64 inputs by 16 outputs).

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "lines.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__linux__)
#define WITH_AMX
#endif
#if defined(WITH_AMX) || defined(EMULATE_AMX)
#define WITH_TILES
#endif

namespace {

#if defined(WITH_TILES)

// Tiles 0..3 are for sums, 4 and 5 for rows, 6 and 7 for weights. All are whole, or 4 to 7 have 32 inputs.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    explicit TileConfig(int inputs) {
        bytes[4] = bytes[5] = uint16_t(inputs);
        rows[6] = rows[7] = uint8_t(inputs / 4);
    }
};

// The tile intrinsics do not tell the compiler that they access memory.
inline void fence() { __asm__ volatile("" ::: "memory"); }

#endif

#if defined(EMULATE_AMX)

// For tests on other CPUs, the same in plain C++. The value of EMULATE_AMX is added to each product: 0, or an error that
// must be detected.
struct Tile {
    int bytes, rows;
    uint8_t data[16][64];
};
thread_local Tile emulated[8];

inline void configure_tiles(int inputs) {
    const TileConfig config(inputs);
    for (int i = 0; i < 8; i++) emulated[i] = {config.bytes[i], config.rows[i], {}};
}
inline void release_tiles() { std::memset(emulated, 0, sizeof emulated); }
inline void zero_tile(int tile) { std::memset(emulated[tile].data, 0, sizeof emulated[tile].data); }
inline void load_tile(int tile, const void* from, int64_t stride) {
    zero_tile(tile);
    Tile& t = emulated[tile];
    for (int i = 0; i < t.rows; i++) std::memcpy(t.data[i], static_cast<const uint8_t*>(from) + i * stride, t.bytes);
}
inline void store_tile(int tile, void* to, int64_t stride) {
    const Tile& t = emulated[tile];
    for (int i = 0; i < t.rows; i++) std::memcpy(static_cast<uint8_t*>(to) + i * stride, t.data[i], t.bytes);
}
template <class Byte>
void dot_tiles(int sums, int rows, int weights) {
    Tile &c = emulated[sums], &a = emulated[rows], &b = emulated[weights];
    if (!c.rows || c.rows != a.rows || c.bytes != b.bytes || a.bytes != 4 * b.rows) std::abort();  // an invalid instruction
    for (int m = 0; m < c.rows; m++) {
        int32_t sum[16];
        std::memcpy(sum, c.data[m], 64);
        for (int k = 0; k < b.rows; k++)
            for (int n = 0; n < c.bytes / 4; n++)
                for (int j = 0; j < 4; j++) sum[n] += int8_t(a.data[m][4 * k + j]) * int32_t(Byte(b.data[k][4 * n + j]));
        for (int n = 0; n < c.bytes / 4; n++) sum[n] += EMULATE_AMX;
        std::memcpy(c.data[m], sum, 64);
    }
}
inline void dot_signed(int sums, int rows, int weights) { dot_tiles<int8_t>(sums, rows, weights); }
inline void dot_unsigned(int sums, int rows, int weights) { dot_tiles<uint8_t>(sums, rows, weights); }

#elif defined(WITH_AMX)

inline void configure_tiles(int inputs) {
    const TileConfig config(inputs);
    _tile_loadconfig(&config);
}
// Some compilers need the numbers of tiles as literals: so these are no functions.
#define release_tiles _tile_release
#define zero_tile _tile_zero
#define load_tile _tile_loadd
#define store_tile _tile_stored
#define dot_signed _tile_dpbssd
#define dot_unsigned _tile_dpbsud

#endif

}  // namespace
