// A check of the matrix unit, once when the library is loaded: takes less than a millisecond.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace {

// Whether products of a kind on the matrix unit are those of blocks.h, to the bit, with random bits in all codes and scales.
template <int KIND>
bool check_kind() {
#if defined(WITH_TILES)
    constexpr Format f = format_of(KIND);
    constexpr int64_t M = 19, N = 5 * TILE_N, K = CHUNK + 32;
    uint32_t state = KIND;
    const auto random = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    std::vector<uint8_t> codes(N / TILE_N * tile_bytes(f, K) + AHEAD);
    std::vector<uint16_t> d(N * 2 * (K / 32));
    std::vector<float> x(M * K), expected(M * N), y(M * N);
    for (auto& v : codes) v = uint8_t(random());
    for (auto& v : d) v = uint16_t(random() & 0xbbff);  // of magnitude below 1
    for (auto& v : x) v = float(random()) - 32768.0f;
    const Weights w{N, K, codes.data(), d.data(), KIND, nullptr, nullptr};
    const int64_t group = f.block == 256 ? 16 : 32;
    Rows r = quantize<F32>(x.data(), M, K, K, f.block, group, true, 1);
    for (int64_t tile = 0; tile < N / TILE_N; tile++) block_rows<KIND, F32>(r, w, tile, expected.data());
    r = quantize<F32>(x.data(), M, K, K, f.block, group, false, 1);
    tile_rows<KIND, F32>(r, w, {0, N / TILE_N}, y.data());
    return std::memcmp(expected.data(), y.data(), M * N * sizeof(float)) == 0;
#else
    return true;
#endif
}

bool check_tiles() {
    return check_kind<2>() && check_kind<3>() && check_kind<6>() && check_kind<7>() && check_kind<8>() && check_kind<12>() && check_kind<13>() && check_kind<14>() && check_kind<20>();
}

}  // namespace
