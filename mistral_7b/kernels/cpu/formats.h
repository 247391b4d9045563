// The formats of weights: GGUF's block formats, in tiles of 16 outputs.
//
//   M rows of activations · N outputs · K inputs · B blocks of K
//
// A row of inputs is divided into blocks of 32 or 256, each with float16 scales d and m. A block of 256 is divided into
// groups, which have integer scales s and t. A weight is, with its code q, at most 8 bits of `low` and `high`:
//
//   Q8_0   Q4_0   Q5_0   d (q - zero)                Q4_K   Q5_K   (d s) q - (m t)         s, t 0..63
//   Q4_1   Q5_1          d q + m                     Q6_K          (d s) (q - 32)          s int8
//   IQ4_NL               d TABLE[q]                  IQ4_XS        (d s) TABLE[q]          s -32..31, as int8
//
// The record of a tile (16 outputs) and a block is lines of 64 bytes, so a weight has the bits it has in the file. A
// line is the operand of one vector instruction (vpdpbusd): 16 outputs by 4 inputs of 8 bits each.
//
//   low      codes of 8 bits: 4 inputs a line, byte (n, j) of line i is that of output n and input 4i + j;
//            of 4 bits: 8 inputs a line, input 8i + j in the low nibble, 8i + 4 + j in the high
//   high     a fifth bit: 32 inputs a line, bit i of byte (n, j) is that of input 4i + j
//            a fifth and a sixth: 16 inputs a line, bits 2i and 2i + 1 of byte (n, j) are those of input 4i + j
//   scales   byte (n, j) of line i: s of group 4i + j, int8; for Q4_K and Q5_K byte 4i + j of the file's 12 bytes
//
// The last block of a row may be shorter than 256: K is padded to 32 only, and its record has fewer lines. Records are
// contiguous: codes[N/16][all lines of a row][64]. The scales follow apart: d[N/16][B][16], with a minimum
// [N/16][B][2][16].

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace {

constexpr int64_t TILE_N = 16, LINE = 64;  // outputs in a tile, bytes in a line

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
        case 2: return {32, 32, 4, 0, 0, 8, false, false};          // Q4_0
        case 3: return {32, 32, 4, 0, 0, 0, true, false};           // Q4_1
        case 6: return {32, 32, 4, 1, 0, 16, false, false};         // Q5_0
        case 7: return {32, 32, 4, 1, 0, 0, true, false};           // Q5_1
        case 8: return {32, 32, 8, 0, 0, 128, false, false};        // Q8_0
        case 12: return {256, 32, 4, 0, SIX_BITS, 0, true, false};  // Q4_K
        case 13: return {256, 32, 4, 1, SIX_BITS, 0, true, false};  // Q5_K
        case 14: return {256, 16, 4, 2, 4, 32, false, false};       // Q6_K
        case 20: return {32, 32, 4, 0, 0, 128, false, true};        // IQ4_NL
        case 23: return {256, 32, 4, 0, 2, 128, false, true};       // IQ4_XS
        default: return {};
    }
}

// Calls f with a format's number as a type: f(std::integral_constant<int, kind>()).
template <class F>
void with_kind(int kind, F f) {
    switch (kind) {
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 6: return f(std::integral_constant<int, 6>());
        case 7: return f(std::integral_constant<int, 7>());
        case 8: return f(std::integral_constant<int, 8>());
        case 12: return f(std::integral_constant<int, 12>());
        case 13: return f(std::integral_constant<int, 13>());
        case 14: return f(std::integral_constant<int, 14>());
        case 20: return f(std::integral_constant<int, 20>());
        case 23: return f(std::integral_constant<int, 23>());
        default: return;
    }
}

// 128 + the values of IQ4_NL and IQ4_XS.
alignas(16) constexpr uint8_t TABLE[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

// Lines of integer scales for a number of groups, at most those of a block. Four groups need no third line of 6 bits.
constexpr int64_t scale_lines(const Format& f, int64_t groups) {
    if (f.scales == SIX_BITS) return groups > 4 ? 3 : 2;
    return f.scales ? (groups + 3) / 4 : 0;
}

// Bytes of the record of a block, or of a shorter last one.
constexpr int64_t record_bytes(const Format& f, int64_t inputs) {
    return inputs * TILE_N * (f.low + f.high) / 8 + scale_lines(f, inputs / f.group) * LINE;
}

// Bytes of all records of a tile.
constexpr int64_t tile_bytes(const Format& f, int64_t Kp) {
    const int64_t rest = Kp % f.block;
    return Kp / f.block * record_bytes(f, f.block) + (rest ? record_bytes(f, rest) : 0);
}

}  // namespace
