// The matrix unit of AMX, where the compiler flags enable it: attention and products of many rows use it.

#pragma once

#include <cstdint>

#include "lines.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__linux__)
#define WITH_AMX
#endif

namespace {

#if defined(WITH_AMX)

// All eight tiles have 16 rows of 64 bytes.
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

#endif

}  // namespace
