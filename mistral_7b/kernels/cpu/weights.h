// Weights, and activations quantized for them, and the definition of their product.
//
// A row of activations is quantized to int8 in the blocks of the weight, of 32 or 256 inputs: sx = absmax / 127,
// xq = round(x / sx). The products with a group are summed as integers, times s, over the block:
//
//   y = sum over blocks, in order: float(sum_g s_g sum_k xq[k] (q[k] - zero)) (d sx), -+ float(sum_g t_g sum_k xq[k]) (m sx)
//
// The integer sums are exact, and blocks are added in order. So the result of a row does not depend on the other rows, on
// the number of threads or on the instruction set.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t PARTS = 16;    // bytes of `parts` per block
constexpr int64_t BEYOND = 256;  // bytes after the last row that may be read, and are multiplied by 0 or not used

// Rows quantized to int8, with a scale per `block` inputs (the last may be shorter) and the sum of codes per `group`
// inputs. M is padded to 16 rows with zeros. T rows (1 or 4) are interleaved: with rows a multiple of 4096 bytes apart,
// equal columns of several would evict each other from the cache.
struct Rows {
    int64_t M, K, Kp, block, group, blocks;
    int8_t* q;      // (M / T, Kp / 4, T, 4)
    float* scale;   // (M / T, blocks, T)
    int32_t* sum;   // (M / T, Kp / group, T)
    int8_t* parts;  // (M / T, blocks, T, PARTS), or null
    // The rows from `row` on, a multiple of T.
    Rows from(int64_t row) const {
        return {M - row, K, Kp, block, group, blocks, q + row * Kp, scale + row * blocks, sum + row * (Kp / group), parts ? parts + row * blocks * PARTS : nullptr};
    }
};

constexpr int64_t TOGETHER = 4;  // T of interleaved rows

// Writes the sums of up to 8 groups of 32 codes as 128 high + low, 0 <= low < 128, two bytes that the dot products of
// lines accept: the high parts of 4 groups, their low parts, and the same for the other 4. sum: those of groups of 16.
inline void split_sums(const int32_t* sum, int64_t groups, int8_t* parts) {
    std::memset(parts, 0, PARTS);
    for (int64_t g = 0; g < groups; g++) {
        const int32_t both = sum[2 * g] + sum[2 * g + 1];
        parts[g / 4 * 8 + g % 4] = int8_t(both >> 7);
        parts[g / 4 * 8 + 4 + g % 4] = int8_t(both & 127);
    }
}

template <class T>
void quantize_row(const Rows& r, int64_t row, const typename T::Store* x) {
    int8_t* q = r.q + row * r.Kp;
    for (int64_t b = 0; b < r.blocks; b++) {
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
        r.scale[row * r.blocks + b] = absmax / 127.0f;
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
        for (int64_t b = 0; b < r.blocks; b++)
            split_sums(r.sum + row * (r.Kp / 16) + b * 16, std::min(r.Kp - b * 256, int64_t(256)) / 32, r.parts + (row * r.blocks + b) * PARTS);
}

// Transposes (TOGETHER, n) elements of E in place.
template <class E>
void interleave(E* p, int64_t n) {
    static thread_local Scratch<E> scratch;
    E* copy = scratch.get(TOGETHER * n);
    std::memcpy(copy, p, TOGETHER * n * sizeof(E));
    for (int64_t i = 0; i < n; i++)
        for (int64_t t = 0; t < TOGETHER; t++) p[i * TOGETHER + t] = copy[t * n + i];
}

struct Parts {
    int8_t bytes[PARTS];
};

// Quantizes M rows, in scratch memory that the next call reuses: a scale per `block` inputs, a sum per `group`.
template <class T>
Rows quantize(const void* x, int64_t M, int64_t K, int64_t Kp, int64_t block, int64_t group, bool interleaved, int threads) {
    static thread_local Scratch<int8_t> codes_scratch;
    static thread_local Scratch<float> scale_scratch;
    static thread_local Scratch<int32_t> sum_scratch;
    static thread_local Scratch<int8_t> parts_scratch;
    const int64_t padded = (M + 15) / 16 * 16, blocks = (Kp + block - 1) / block, groups = Kp / group;
    int8_t* parts = block == 256 && group == 16 ? parts_scratch.get(padded * blocks * PARTS) : nullptr;
    const Rows r{M, K, Kp, block, group, blocks, codes_scratch.get(padded * Kp + BEYOND), scale_scratch.get(padded * blocks), sum_scratch.get(padded * groups), parts};
    const auto* rows = static_cast<const typename T::Store*>(x);
    std::memset(r.q + M * Kp, 0, (padded - M) * Kp);
    std::fill_n(r.scale + M * blocks, (padded - M) * blocks, 0.0f);
    std::fill_n(r.sum + M * groups, (padded - M) * groups, 0);
    if (parts) std::memset(parts + M * blocks * PARTS, 0, (padded - M) * blocks * PARTS);
    parallel(M < 4 ? 1 : threads, [&](int t, int n) {
        const Span range = partition((M + TOGETHER - 1) / TOGETHER, t, n);
        for (int64_t m = range.begin * TOGETHER; m < range.end * TOGETHER; m += TOGETHER) {
            for (int64_t i = m; i < std::min(m + TOGETHER, M); i++) quantize_row<T>(r, i, rows + i * K);
            if (!interleaved) continue;
            interleave(reinterpret_cast<int32_t*>(r.q + m * Kp), Kp / 4);
            interleave(r.scale + m * blocks, blocks);
            interleave(r.sum + m * groups, groups);
            if (parts) interleave(reinterpret_cast<Parts*>(parts + m * blocks * PARTS), blocks);
        }
    });
    return r;
}

struct Weights {
    int64_t N, Kp;            // Kp: inputs, padded to 32
    const uint8_t* codes;     // the records of formats.h
    const uint16_t* d;        // float16 scales, and minima
    int kind;                 // GGUF's number of the format
    const struct LowRank* adapters;  // LoRA factors of each adapter (low_rank.h), or null
    struct Mixture* mixture;         // the adapter of each row
};

}  // namespace
