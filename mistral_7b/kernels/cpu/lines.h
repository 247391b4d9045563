// Products of a line of weights (16 outputs by 4 inputs, see formats.h) with 4 inputs of a row, in the widest instruction
// set that the compiler flags enable. A register holds LANES outputs: a line is one register, or two parts. Integer sums
// are exact, so all instruction sets agree.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "vectors.h"

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int LANES = 16;
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

constexpr int LANES = 8;
using Line = __m256i;
using Sums = __m256i;  // 8 int32
constexpr int32_t SUBTRACT = 0;  // dot8 uses w8 = q - 128
inline Line load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Line masked(Line v, uint8_t mask) { return _mm256_and_si256(v, _mm256_set1_epi8(char(mask))); }
inline Line low(Line v) { return masked(v, 15); }
inline Line high(Line v) { return masked(_mm256_srli_epi16(v, 4), 15); }
inline Line merge(Line code, Line plane, int shift, uint8_t mask) {
    return _mm256_or_si256(code, masked(shift < 0 ? _mm256_srli_epi16(plane, -shift) : _mm256_slli_epi16(plane, shift), mask));
}
inline Line lookup(Line codes, const uint8_t* table) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), codes);
}
inline Sums start(int32_t v) { return _mm256_set1_epi32(v); }
inline Sums zero() { return _mm256_setzero_si256(); }
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
inline Sums dot8(Sums s, Line v, const int8_t* x) {
    const __m256i w = _mm256_xor_si256(v, _mm256_set1_epi8(-128));
    s = add_quads(s, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(quad_of(x), w)));
    asm("" : "+x"(s));  // as in dot4
    return s;
}
// Two products of a code and x are added in int16, and so are those of more lines, as long as no sum can exceed it:
// 2 * 15 * 127 * 8 = 30480.
using Pairs = __m256i;  // 16 int16
constexpr int most_pairs(int bits) { return 128 >> bits; }
inline Pairs begin(Sums) { return _mm256_setzero_si256(); }
inline Pairs dot4(Pairs p, Line v, const int8_t* x) {
    p = _mm256_add_epi16(p, _mm256_maddubs_epi16(v, quad_of(x)));
    asm("" : "+x"(p));  // adds now: GCC would keep the products of many lines, in memory, to add them in pairs
    return p;
}
inline Sums end(Sums s, Pairs p) { return add_quads(s, p); }

#elif defined(__ARM_FEATURE_DOTPROD)

// vdotq_s32 multiplies signed bytes by signed bytes, and i8mm's vusdotq_s32 unsigned by signed ones; both add the four
// products of an output in 32 bits.
constexpr int LANES = 4;
using Line = uint8x16_t;
using Sums = int32x4_t;
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int32_t SUBTRACT = 128;
#else
constexpr int32_t SUBTRACT = 0;  // dot8 uses w8 = q - 128
#endif
inline Line load(const uint8_t* p) { return vld1q_u8(p); }
inline Line masked(Line v, uint8_t mask) { return vandq_u8(v, vdupq_n_u8(mask)); }
inline Line low(Line v) { return masked(v, 15); }
inline Line high(Line v) { return vshrq_n_u8(v, 4); }
inline Line merge(Line code, Line plane, int shift, uint8_t mask) {
    return vorrq_u8(code, masked(vshlq_u8(plane, vdupq_n_s8(int8_t(shift))), mask));
}
inline Line lookup(Line codes, const uint8_t* table) { return vqtbl1q_u8(vld1q_u8(table), codes); }
inline Sums start(int32_t v) { return vdupq_n_s32(v); }
inline Sums zero() { return start(0); }
inline int8x16_t quad_of(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}
using Pairs = Sums;
constexpr int most_pairs(int) { return 1 << 20; }
inline Pairs begin(Sums s) { return s; }
inline Pairs dot4(Pairs s, Line v, const int8_t* x) { return vdotq_s32(s, vreinterpretq_s8_u8(v), quad_of(x)); }
inline Sums end(Sums, Pairs p) { return p; }
inline Sums dot8(Sums s, Line v, const int8_t* x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(s, v, quad_of(x));
#else
    return dot4(s, veorq_u8(v, vdupq_n_u8(128)), x);
#endif
}

#else

constexpr int LANES = 16;
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

// Vectors of as many numbers as Sums.
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Floats = float __attribute__((vector_size(4 * LANES)));

template <class T>
inline Ints words(const T& v) {
    Ints out;
    static_assert(sizeof v == sizeof out, "");
    std::memcpy(&out, &v, sizeof out);
    return out;
}
inline Floats floats(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Ints ints(const int32_t* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
// The float16 numbers at p.
inline Floats halves(const uint16_t* p) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__ARM_FEATURE_DOTPROD)
    return reinterpret_cast<Floats>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
#elif defined(__AVX2__) && defined(__F16C__)
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = from_half(p[i]);
    return v;
#endif
}

}  // namespace
