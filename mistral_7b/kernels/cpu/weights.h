// The layout of weights and activations, and the definition of their product.
//
//   M rows of activations · N outputs · K inputs · G groups of K
//
// A weight is stored in lines of 64 bytes, 16 outputs by 4 inputs each, so that one load is the operand of one
// vector instruction (vpdpbusd) and 16 lines are one AMX tile:
//
//   int8   codes[N/16][K/4][16][4]   byte (n, j) of line i   is q[n, 4i + j]                w8 = q - 128
//   int4   codes[N/16][K/8][16][4]   byte (n, j) of line i   is q[n, 8i + j] low nibble, q[n, 8i + 4 + j] high
//          groups[N/16][G][16]       a byte                  is m low nibble, z high        w8 = m (q - z)
//
// N is padded to 16 and K to 64 (and to whole groups); the activations of padded inputs are zero.
// Activations are quantized to int8 per row: sx = absmax / 127, xq = round(x / sx). Then
//
//   y[m, n] = float(sum_k xq[m, k] w8[n, k]) * sx[m] * scale[n]
//
// Integer sums are exact, so the result of a row does not depend on the other rows, on the number of threads or on
// the instruction set. gguf_blocks.h has the same for GGUF's block formats.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t TILE_N = 16, LINE = 64;  // outputs in a tile, bytes in a line
constexpr int64_t PARTS = 16;              // bytes of `parts` per block

// Rows quantized to int8, with a scale per `block` inputs and the sum of codes per `group` inputs. M is padded to 16
// rows with zeros.
struct Rows {
    int64_t M, K, Kp, block, group;
    int8_t* q;      // (M, Kp)
    float* scale;   // (M, Kp / block)
    int32_t* sum;   // (M, Kp / group)
    int8_t* parts;  // (M, Kp / 256, PARTS), or null
};

// Writes the sums of 8 groups of 32 codes as 128 high + low, 0 <= low < 128, two bytes that the dot products of lines
// accept: the high parts of 4 groups, their low parts, and the same for the other 4. sum: those of groups of 16.
inline void split_sums(const int32_t* sum, int8_t* parts) {
    for (int g = 0; g < 8; g++) {
        const int32_t both = sum[2 * g] + sum[2 * g + 1];
        parts[g / 4 * 8 + g % 4] = int8_t(both >> 7);
        parts[g / 4 * 8 + 4 + g % 4] = int8_t(both & 127);
    }
}

template <class T>
void quantize_row(const Rows& r, int64_t row, const typename T::Store* x) {
    int8_t* q = r.q + row * r.Kp;
    for (int64_t b = 0; b * r.block < r.Kp; b++) {
        const int64_t begin = b * r.block, end = std::max(begin, std::min(begin + r.block, r.K));
        uint32_t absmax_bits = 0;  // bits order as magnitudes; inf and NaN are the largest
        for (int64_t k = begin; k < end; k++) {
            float v = T::load(x, k);
            uint32_t bits;
            std::memcpy(&bits, &v, 4);
            absmax_bits = std::max(absmax_bits, bits & 0x7fffffffu);
        }
        float absmax;
        std::memcpy(&absmax, &absmax_bits, 4);
        r.scale[row * (r.Kp / r.block) + b] = absmax / 127.0f;
        const float inverse = absmax > 0 ? 127.0f / absmax : 0.0f;
        const bool finite = absmax_bits < 0x7f800000u && inverse <= 3.0e38f;
        if (finite)
            for (int64_t k = begin; k < end; k++) q[k] = int8_t(int32_t(__builtin_rintf(T::load(x, k) * inverse)));
        else  // the scale is 0, inf or NaN, and so are the products
            std::memset(q + begin, 0, end - begin);
    }
    std::memset(q + r.K, 0, r.Kp - r.K);
    for (int64_t g = 0; g * r.group < r.Kp; g++) {
        int32_t s = 0;
        for (int64_t k = g * r.group; k < (g + 1) * r.group; k++) s += q[k];
        r.sum[row * (r.Kp / r.group) + g] = s;
    }
    if (r.parts)
        for (int64_t b = 0; b < r.Kp / 256; b++) split_sums(r.sum + row * (r.Kp / 16) + b * 16, r.parts + (row * (r.Kp / 256) + b) * PARTS);
}

// Quantizes M rows, in scratch memory that the next call reuses: a scale per `block` inputs, a sum per `group`.
template <class T>
Rows quantize(const void* x, int64_t M, int64_t K, int64_t Kp, int64_t block, int64_t group, int threads) {
    static thread_local Scratch<int8_t> codes_scratch;
    static thread_local Scratch<float> scale_scratch;
    static thread_local Scratch<int32_t> sum_scratch;
    static thread_local Scratch<int8_t> parts_scratch;
    const int64_t padded = (M + 15) / 16 * 16, blocks = Kp / block, groups = Kp / group;
    int8_t* parts = block == 256 && group == 16 ? parts_scratch.get(padded * blocks * PARTS) : nullptr;
    const Rows r{M, K, Kp, block, group, codes_scratch.get(padded * Kp), scale_scratch.get(padded * blocks), sum_scratch.get(padded * groups), parts};
    const auto* rows = static_cast<const typename T::Store*>(x);
    parallel(M < 4 ? 1 : threads, [&](int t, int n) {
        const Span range = partition(M, t, n);
        for (int64_t m = range.begin; m < range.end; m++) quantize_row<T>(r, m, rows + m * K);
    });
    std::memset(r.q + M * Kp, 0, (padded - M) * Kp);
    std::fill_n(r.scale + M * blocks, (padded - M) * blocks, 0.0f);
    std::fill_n(r.sum + M * groups, (padded - M) * groups, 0);
    if (parts) std::memset(parts + M * blocks * PARTS, 0, (padded - M) * blocks * PARTS);
    return r;
}

struct Weights {
    int64_t N, Kp, group;  // group: inputs in an int4 group; Kp for int8
    const uint8_t* codes;
    const uint8_t* groups;    // int4 only
    const float* scale;       // (N,)
    const uint16_t* d;        // block formats only: float16 scales
    int bits, kind;           // kind: GGUF's number of a block format (gguf_blocks.h), or 0
    const struct LowRank* adapters;  // LoRA factors of each adapter (low_rank.h), or null
    struct Mixture* mixture;         // the adapter of each row
};

// y = float(sums) * sx * scale, for the 16 outputs of a tile, or fewer in the last one.
template <class T>
inline void finish(const Rows& r, const Weights& w, int64_t row, int64_t tile, const int32_t* sums, void* out) {
    I16 v;
    std::memcpy(&v, sums, 64);
    const F16 y = __builtin_convertvector(v, F16) * r.scale[row] * load(w.scale + tile * TILE_N);
    store(static_cast<typename T::Store*>(out) + row * w.N + tile * TILE_N, y, w.N - tile * TILE_N);
}

}  // namespace
