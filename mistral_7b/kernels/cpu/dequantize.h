// Weights in rows of floats, for products with their transpose: gradients of activations.
//
// A value is (q - zero) (d s), or q (d s) - m t: a product of float16 numbers and integers of at most 13 bits in all is
// exact in float32. Only the difference rounds, so the result does not depend on the instruction set.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "blocks.h"

namespace {

struct DequantizeCall {
    const Weights* weight;
    void* out;             // (N, width)
    int64_t first, width;  // the inputs first..first + width; first begins a block
    int bf16, threads;
};

// The codes of output n for 16 inputs: four quads, put together in a register.
inline I16 codes_of(const Line* lines, int64_t n) {
    using Quads = uint32_t __attribute__((vector_size(16)));
    const auto* quads = reinterpret_cast<const uint32_t __attribute__((may_alias))*>(lines) + n;
    const Quads codes{quads[0], quads[LANES], quads[2 * LANES], quads[3 * LANES]};
    return Memory<I16>::read(reinterpret_cast<const uint8_t*>(&codes));
}

// The first `width` inputs of a block of `groups` groups, for the first `rows` outputs of its tile.
template <int KIND, class T>
void dequantize_block(const uint8_t* codes, const uint16_t* d, int64_t groups, int64_t rows, int64_t width, int64_t stride, typename T::Store* out) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t LOW = f.group * TILE_N * f.low / 8, HIGH = f.group * TILE_N * f.high / 8, QUADS = f.group / 4;
    for (int64_t part = 0; part < rows; part += LANES, codes += 4 * LANES, d += LANES) {
        const GroupScales<KIND> scales(codes + groups * (LOW + HIGH), groups);
        const Floats scale = halves(d), minimum = f.minimum ? halves(d + TILE_N) : Floats{};
        for (int64_t g = 0; g * f.group < width; g++) {
            alignas(64) Line lines[QUADS];
            Line plane{};
            if (f.high) plane = load(codes + groups * LOW + g * HIGH);
            for (int k = 0; k < QUADS; k += 2) unpack<KIND>(codes + g * LOW, plane, k, lines[k], lines[k + 1]);
            Floats step = scale, offset = -minimum;
            if constexpr (f.scales != 0) step *= __builtin_convertvector(scales.of(g), Floats);
            if constexpr (f.scales != 0 && f.minimum) offset = minimum * __builtin_convertvector(scales.minimum_of(g), Floats);
            for (int64_t n = 0; n < std::min<int64_t>(LANES, rows - part); n++)
                for (int64_t i = 0, k = g * f.group; i < f.group && k < width; i += 16, k += 16) {
                    const F16 q = to_floats(codes_of(lines + i / 4, n) - f.zero);
                    store(out + (part + n) * stride + k, q * step[n] - offset[n], width - k);
                }
        }
    }
}

template <int KIND, class T>
void dequantize_tiles(const DequantizeCall& c, Span tiles) {
    constexpr Format f = format_of(KIND);
    constexpr int64_t D = (1 + f.minimum) * TILE_N;
    const Weights& w = *c.weight;
    const int64_t blocks = (w.Kp + f.block - 1) / f.block;
    for (int64_t tile = tiles.begin; tile < tiles.end; tile++)
        for (int64_t b = c.first / f.block, k = 0; k < c.width; b++, k += f.block) {
            const uint8_t* codes = w.codes + tile * tile_bytes(f, w.Kp) + b * record_bytes(f, f.block);
            auto* out = static_cast<typename T::Store*>(c.out) + tile * TILE_N * c.width + k;
            const int64_t groups = std::min<int64_t>(f.block, w.Kp - b * f.block) / f.group;
            dequantize_block<KIND, T>(codes, w.d + (tile * blocks + b) * D, groups, std::min(TILE_N, w.N - tile * TILE_N), std::min<int64_t>(f.block, c.width - k), c.width, out);
        }
}

template <class T>
void dequantize(const DequantizeCall& c) {
    parallel(c.threads, [&](int t, int n) {
        const Span tiles = partition((c.weight->N + TILE_N - 1) / TILE_N, t, n);
        with_kind(c.weight->kind, [&](auto kind) { dequantize_tiles<decltype(kind)::value, T>(c, tiles); });
    });
}

}  // namespace
