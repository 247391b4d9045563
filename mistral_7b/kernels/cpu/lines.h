// Products of a 64-byte line of weights (16 outputs by 4 inputs, see weights.h) with 4 inputs of a row, in the widest
// instruction set that the compiler flags enable. Integer sums are exact, so all instruction sets agree.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

using Line = __m512i;
using Sums = __m512i;  // 16 int32
constexpr int32_t SUBTRACT = 128;  // dot8 uses codes q = w8 + 128: subtract this times the sum of x
Line load(const uint8_t* p) { return _mm512_loadu_si512(p); }
Line low(Line v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
Line high(Line v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
Line masked(Line v, uint8_t mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); }
// code | the bits of `mask` of plane, shifted left (right if negative), as words: there are no shifts of bytes
Line merge(Line code, Line plane, int shift, uint8_t mask) {
    const W32 v = reinterpret_cast<W32>(plane);
    return _mm512_or_si512(code, masked(reinterpret_cast<Line>(shift < 0 ? v >> -shift : v << shift), mask));
}
Line lookup(Line codes, const uint8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), codes);
}
I16 words(Line v) { return reinterpret_cast<I16>(v); }
I16 lanes(Sums s) { return reinterpret_cast<I16>(s); }
Sums start(int32_t v) { return _mm512_set1_epi32(v); }
Sums zero() { return _mm512_setzero_si512(); }
Sums dot8(Sums s, Line v, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return _mm512_dpbusd_epi32(s, v, _mm512_set1_epi32(quad));
}
// Sums of products with codes below 128: of at most `most_pairs` lines with codes of `bits` bits.
using Pairs = Sums;
constexpr int most_pairs(int) { return 1 << 20; }
Pairs begin(Sums s) { return s; }
Pairs dot4(Pairs s, Line v, const int8_t* x) { return dot8(s, v, x); }
Sums end(Sums, Pairs p) { return p; }

#elif defined(__AVX2__)

// Two halves of 32 bytes: 8 outputs by 4 inputs each.
struct Line {
    __m256i half[2];
};
struct Sums {
    __m256i half[2];  // 8 int32 each
};
constexpr int32_t SUBTRACT = 0;  // dot8 uses w8 = q - 128
inline Line load(const uint8_t* p) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline Line low(const Line& l) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(l.half[0], mask), _mm256_and_si256(l.half[1], mask)};
}
inline Line high(const Line& l) {
    return low({_mm256_srli_epi16(l.half[0], 4), _mm256_srli_epi16(l.half[1], 4)});
}
inline Line masked(const Line& l, uint8_t mask) {
    const __m256i m = _mm256_set1_epi8(char(mask));
    return {_mm256_and_si256(l.half[0], m), _mm256_and_si256(l.half[1], m)};
}
inline Line merge(const Line& code, const Line& plane, int shift, uint8_t mask) {
    Line out = plane;
    for (auto& half : out.half) half = shift < 0 ? _mm256_srli_epi16(half, -shift) : _mm256_slli_epi16(half, shift);
    out = masked(out, mask);
    for (int h = 0; h < 2; h++) out.half[h] = _mm256_or_si256(out.half[h], code.half[h]);
    return out;
}
inline Line lookup(const Line& codes, const uint8_t* table) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(both, codes.half[0]), _mm256_shuffle_epi8(both, codes.half[1])};
}
inline I16 words(const Line& l) {
    I16 v;
    std::memcpy(&v, &l, 64);
    return v;
}
inline I16 lanes(const Sums& s) {
    I16 v;
    std::memcpy(&v, &s, 64);
    return v;
}
inline Sums start(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline __m256i quad_of(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return _mm256_set1_epi32(quad);
}
inline __m256i add_quads(__m256i s, __m256i pairs) {  // pairs: int16
    return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// vpmaddubsw adds two products of an unsigned and a signed byte in int16, with saturation. For |w8| <= 128 times x with
// the sign of w8, |x| <= 127, the sum is at most 32512: exact. With codes up to 255 instead of |w8|, it could saturate.
inline Sums dot8(Sums s, const Line& l, const int8_t* x) {
    const __m256i xs = quad_of(x);
    for (int h = 0; h < 2; h++) {
        const __m256i w = _mm256_xor_si256(l.half[h], _mm256_set1_epi8(-128));
        s.half[h] = add_quads(s.half[h], _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xs, w)));
    }
    return s;
}
// Two products of a code and x are added in int16, and so are those of more lines, as long as no sum can exceed it:
// 2 * 15 * 127 * 8 = 30480.
struct Pairs {
    __m256i half[2];  // 16 int16 each
};
constexpr int most_pairs(int bits) { return 128 >> bits; }
inline Pairs begin(const Sums&) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Pairs dot4(const Pairs& p, const Line& l, const int8_t* x) {
    const __m256i xs = quad_of(x);
    return {_mm256_add_epi16(p.half[0], _mm256_maddubs_epi16(l.half[0], xs)), _mm256_add_epi16(p.half[1], _mm256_maddubs_epi16(l.half[1], xs))};
}
inline Sums end(const Sums& s, const Pairs& p) { return {add_quads(s.half[0], p.half[0]), add_quads(s.half[1], p.half[1])}; }

#else

struct Line {
    uint8_t b[64];
};
struct Sums {
    int32_t v[16];
};
constexpr int32_t SUBTRACT = 128;
inline Line load(const uint8_t* p) {
    Line l;
    std::memcpy(l.b, p, 64);
    return l;
}
inline Line low(Line l) {
    for (auto& b : l.b) b &= 15;
    return l;
}
inline Line high(Line l) {
    for (auto& b : l.b) b >>= 4;
    return l;
}
inline Line masked(Line l, uint8_t mask) {
    for (auto& b : l.b) b &= mask;
    return l;
}
inline Line merge(Line code, const Line& plane, int shift, uint8_t mask) {
    for (int i = 0; i < 64; i++) code.b[i] |= (shift < 0 ? plane.b[i] >> -shift : plane.b[i] << shift) & mask;
    return code;
}
inline Line lookup(Line codes, const uint8_t* table) {
    for (auto& b : codes.b) b = table[b];
    return codes;
}
inline I16 words(const Line& l) {
    I16 v;
    std::memcpy(&v, l.b, 64);
    return v;
}
inline I16 lanes(const Sums& s) {
    I16 v;
    std::memcpy(&v, s.v, 64);
    return v;
}
inline Sums start(int32_t v) {
    Sums s;
    for (auto& n : s.v) n = v;
    return s;
}
inline Sums zero() { return Sums{}; }
inline Sums dot8(Sums s, const Line& l, const int8_t* x) {
    for (int n = 0; n < 16; n++)
        for (int j = 0; j < 4; j++) s.v[n] += int32_t(l.b[4 * n + j]) * x[j];
    return s;
}
using Pairs = Sums;
constexpr int most_pairs(int) { return 1 << 20; }
inline Pairs begin(const Sums& s) { return s; }
inline Pairs dot4(const Pairs& s, const Line& l, const int8_t* x) { return dot8(s, l, x); }
inline Sums end(const Sums&, const Pairs& p) { return p; }

#endif

}  // namespace
