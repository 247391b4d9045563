// Products of a 64-byte line of weights (16 outputs by 4 inputs, see weights.h) with 4 inputs of a row, in the widest
// instruction set that the compiler flags enable. Integer sums are exact, so all instruction sets agree.

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

using Line = __m512i;
using Sums = __m512i;  // 16 int32
using Words = uint16_t __attribute__((vector_size(64)));  // 32 words of 16 bits: there are no shifts of bytes
constexpr int64_t ROWS_BY_TWO = 1 << 30;  // max rows for which the sums of two tiles fit in registers
constexpr int32_t SUBTRACT = 128;  // dot8 uses codes q = w8 + 128: subtract this times the sum of x
Line load(const uint8_t* p) { return _mm512_loadu_si512(p); }
Line low(Line v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
Line high(Line v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
Line masked(Line v, uint8_t mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); }
// code | the bits of `mask` of plane, shifted left (right if negative)
Line merge(Line code, Line plane, int shift, uint8_t mask) {
    const Words v = reinterpret_cast<Words>(plane);
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
Sums dot4(Sums s, Line v, const int8_t* x) { return dot8(s, v, x); }
Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
void store(int32_t* out, Sums s) { _mm512_storeu_si512(out, s); }
// total + m (s - z sum), with m and z from the tile's group bytes
Sums add_group(Sums total, Sums s, const uint8_t* group, int32_t sum) {
    __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group)));
    __m512i m = _mm512_and_si512(b, _mm512_set1_epi32(15)), z = _mm512_srli_epi32(b, 4);
    s = _mm512_sub_epi32(s, _mm512_mullo_epi32(z, _mm512_set1_epi32(sum)));
    return _mm512_add_epi32(total, _mm512_mullo_epi32(m, s));
}
// Repacks a line of int4 codes as int8: 128 + m (q - z) = q * m + shift.
struct Repack {
    __m512i m, shift;
    explicit Repack(const uint8_t* group) {
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group)));
        const __m512i z = _mm512_srli_epi32(b, 4);
        m = _mm512_and_si512(b, _mm512_set1_epi32(15));
        shift = _mm512_and_si512(_mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_mullo_epi32(m, z)), _mm512_set1_epi32(255));
        shift = _mm512_mullo_epi32(shift, _mm512_set1_epi32(0x01010101));
        m = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));  // m q <= 225: a 16-bit product of two bytes has no carry
    }
    void store(uint8_t* out, Line q) const { _mm512_storeu_si512(out, _mm512_add_epi8(_mm512_mullo_epi16(q, m), shift)); }
};

#elif defined(__AVX2__)

// Two halves of 32 bytes: 8 outputs by 4 inputs each.
struct Line {
    __m256i half[2];
};
struct Sums {
    __m256i half[2];  // 8 int32 each
};
constexpr int64_t ROWS_BY_TWO = 2;
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
inline Sums dot4(Sums s, const Line& l, const int8_t* x) {  // codes below 128
    const __m256i xs = quad_of(x);
    for (int h = 0; h < 2; h++) s.half[h] = add_quads(s.half[h], _mm256_maddubs_epi16(l.half[h], xs));
    return s;
}
inline Sums add(const Sums& a, const Sums& b) {
    return {_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])};
}
inline void store(int32_t* out, const Sums& s) {
    for (int h = 0; h < 2; h++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + h, s.half[h]);
}
// Group bytes of a tile: multipliers m and zero points z of 8 outputs.
inline __m256i bytes_of(const uint8_t* group) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(group)));
}
inline Sums add_group(Sums total, const Sums& s, const uint8_t* group, int32_t sum) {
    for (int h = 0; h < 2; h++) {
        const __m256i b = bytes_of(group + 8 * h);
        const __m256i m = _mm256_and_si256(b, _mm256_set1_epi32(15)), z = _mm256_srli_epi32(b, 4);
        const __m256i centered = _mm256_sub_epi32(s.half[h], _mm256_mullo_epi32(z, _mm256_set1_epi32(sum)));
        total.half[h] = _mm256_add_epi32(total.half[h], _mm256_mullo_epi32(m, centered));
    }
    return total;
}
struct Repack {
    __m256i m[2], shift[2];
    explicit Repack(const uint8_t* group) {
        for (int h = 0; h < 2; h++) {
            const __m256i b = bytes_of(group + 8 * h), z = _mm256_srli_epi32(b, 4);
            const __m256i multiplier = _mm256_and_si256(b, _mm256_set1_epi32(15));
            const __m256i from = _mm256_sub_epi32(_mm256_set1_epi32(128), _mm256_mullo_epi32(multiplier, z));
            shift[h] = _mm256_mullo_epi32(_mm256_and_si256(from, _mm256_set1_epi32(255)), _mm256_set1_epi32(0x01010101));
            m[h] = _mm256_or_si256(multiplier, _mm256_slli_epi32(multiplier, 16));  // as above
        }
    }
    void store(uint8_t* out, const Line& q) const {
        for (int h = 0; h < 2; h++)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + h, _mm256_add_epi8(_mm256_mullo_epi16(q.half[h], m[h]), shift[h]));
    }
};

#elif defined(__ARM_FEATURE_DOTPROD)

// Four quarters of 16 bytes: 4 outputs by 4 inputs each. vdotq_s32 multiplies signed bytes by signed bytes, and i8mm's
// vusdotq_s32 unsigned by signed ones; both add the four products of an output in 32 bits.
using Line = uint8x16x4_t;
using Sums = int32x4x4_t;  // 4 int32 each
constexpr int64_t ROWS_BY_TWO = 2;
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int32_t SUBTRACT = 128;
#else
constexpr int32_t SUBTRACT = 0;  // dot8 uses w8 = q - 128
#endif
inline Line load(const uint8_t* p) { return vld1q_u8_x4(p); }
inline Line low(Line l) {
    for (auto& quarter : l.val) quarter = vandq_u8(quarter, vdupq_n_u8(15));
    return l;
}
inline Line high(Line l) {
    for (auto& quarter : l.val) quarter = vshrq_n_u8(quarter, 4);
    return l;
}
inline Line masked(Line l, uint8_t mask) {
    for (auto& quarter : l.val) quarter = vandq_u8(quarter, vdupq_n_u8(mask));
    return l;
}
inline Line merge(Line code, Line plane, int shift, uint8_t mask) {
    for (auto& quarter : plane.val) quarter = vshlq_u8(quarter, vdupq_n_s8(int8_t(shift)));
    plane = masked(plane, mask);
    for (int i = 0; i < 4; i++) code.val[i] = vorrq_u8(code.val[i], plane.val[i]);
    return code;
}
inline Line lookup(Line codes, const uint8_t* table) {
    for (auto& quarter : codes.val) quarter = vqtbl1q_u8(vld1q_u8(table), quarter);
    return codes;
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
inline Sums start(int32_t v) { return {{vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v)}}; }
inline Sums zero() { return start(0); }
inline int8x16_t quad_of(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}
inline Sums dot4(Sums s, Line l, const int8_t* x) {  // codes below 128
    const int8x16_t xs = quad_of(x);
    for (int i = 0; i < 4; i++) s.val[i] = vdotq_s32(s.val[i], vreinterpretq_s8_u8(l.val[i]), xs);
    return s;
}
inline Sums dot8(Sums s, Line l, const int8_t* x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    const int8x16_t xs = quad_of(x);
    for (int i = 0; i < 4; i++) s.val[i] = vusdotq_s32(s.val[i], l.val[i], xs);
    return s;
#else
    for (auto& quarter : l.val) quarter = veorq_u8(quarter, vdupq_n_u8(128));
    return dot4(s, l, x);
#endif
}
inline Sums add(Sums a, const Sums& b) {
    for (int i = 0; i < 4; i++) a.val[i] = vaddq_s32(a.val[i], b.val[i]);
    return a;
}
inline void store(int32_t* out, const Sums& s) { std::memcpy(out, &s, 64); }
inline Sums add_group(Sums total, const Sums& s, const uint8_t* group, int32_t sum) {
    for (int n = 0; n < 16; n++) total.val[n / 4][n % 4] += (group[n] & 15) * (s.val[n / 4][n % 4] - (group[n] >> 4) * sum);
    return total;
}
struct Repack {
    const uint8_t* group;
    explicit Repack(const uint8_t* g) : group(g) {}
    void store(uint8_t* out, const Line& q) const {
        for (int i = 0; i < 64; i++)
            out[i] = uint8_t(128 + (group[i / 4] & 15) * (int(q.val[i / 16][i % 16]) - (group[i / 4] >> 4)));
    }
};

#else

struct Line {
    uint8_t b[64];
};
struct Sums {
    int32_t v[16];
};
constexpr int64_t ROWS_BY_TWO = 2;
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
inline Sums dot4(Sums s, const Line& l, const int8_t* x) { return dot8(s, l, x); }
inline Sums add(Sums a, Sums b) {
    for (int n = 0; n < 16; n++) a.v[n] += b.v[n];
    return a;
}
inline void store(int32_t* out, Sums s) { std::memcpy(out, s.v, 64); }
inline Sums add_group(Sums total, Sums s, const uint8_t* group, int32_t sum) {
    for (int n = 0; n < 16; n++) total.v[n] += (group[n] & 15) * (s.v[n] - (group[n] >> 4) * sum);
    return total;
}
struct Repack {
    const uint8_t* group;
    explicit Repack(const uint8_t* g) : group(g) {}
    void store(uint8_t* out, const Line& q) const {
        for (int n = 0; n < 16; n++)
            for (int j = 0; j < 4; j++)
                out[4 * n + j] = uint8_t(128 + (group[n] & 15) * (int(q.b[4 * n + j]) - (group[n] >> 4)));
    }
};

#endif

}  // namespace
