// A line of 64 bytes, sixteen outputs by four inputs, times four inputs of a row: what weights.h lays out, in the widest
// instructions that the flags allow. Integer sums are exact, so all of them agree.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

using Line = __m512i;
using Sums = __m512i;  // sixteen int32
Line load(const uint8_t* p) { return _mm512_loadu_si512(p); }
Line low(Line v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
Line high(Line v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
Sums zero() { return _mm512_setzero_si512(); }
Sums dot8(Sums s, Line v, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return _mm512_dpbusd_epi32(s, v, _mm512_set1_epi32(quad));
}
Sums dot4(Sums s, Line v, const int8_t* x) { return dot8(s, v, x); }
Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
void store(int32_t* out, Sums s) { _mm512_storeu_si512(out, s); }
// total + m (s - z sum), with m and z from a tile's group bytes
Sums fold(Sums total, Sums s, const uint8_t* group, int32_t sum) {
    __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group)));
    __m512i m = _mm512_and_si512(b, _mm512_set1_epi32(15)), z = _mm512_srli_epi32(b, 4);
    s = _mm512_sub_epi32(s, _mm512_mullo_epi32(z, _mm512_set1_epi32(sum)));
    return _mm512_add_epi32(total, _mm512_mullo_epi32(m, s));
}
// How a group's nibbles become bytes 128 + m (q - z), for a line of them: q * m + shift.
struct Repacking {
    __m512i m, shift;
    explicit Repacking(const uint8_t* group) {
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group)));
        const __m512i z = _mm512_srli_epi32(b, 4);
        m = _mm512_and_si512(b, _mm512_set1_epi32(15));
        shift = _mm512_and_si512(_mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_mullo_epi32(m, z)), _mm512_set1_epi32(255));
        shift = _mm512_mullo_epi32(shift, _mm512_set1_epi32(0x01010101));
        m = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));  // m q <= 225: two bytes multiply without a carry
    }
    void store(uint8_t* out, Line q) const { _mm512_storeu_si512(out, _mm512_add_epi8(_mm512_mullo_epi16(q, m), shift)); }
};

#else

struct Line {
    uint8_t b[64];
};
struct Sums {
    int32_t v[16];
};
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
inline Sums zero() { return Sums{}; }
#if defined(__AVX2__)
inline Sums dot4(Sums s, const Line& l, const int8_t* x) {  // bytes below 16: pairs fit int16
    int32_t quad;
    std::memcpy(&quad, x, 4);
    __m256i xs = _mm256_set1_epi32(quad), one = _mm256_set1_epi16(1);
    for (int h = 0; h < 2; h++) {
        __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(l.b + 32 * h));
        __m256i* to = reinterpret_cast<__m256i*>(s.v + 8 * h);
        __m256i d = _mm256_madd_epi16(_mm256_maddubs_epi16(v, xs), one);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), d));
    }
    return s;
}
inline Sums dot8(Sums s, const Line& l, const int8_t* x) {  // a byte is 16 high + low: both halves fit
    Sums h = dot4(zero(), high(l), x);
    s = dot4(s, low(l), x);
    for (int n = 0; n < 16; n++) s.v[n] += 16 * h.v[n];
    return s;
}
#else
inline Sums dot8(Sums s, const Line& l, const int8_t* x) {
    for (int n = 0; n < 16; n++)
        for (int j = 0; j < 4; j++) s.v[n] += int32_t(l.b[4 * n + j]) * x[j];
    return s;
}
inline Sums dot4(Sums s, const Line& l, const int8_t* x) { return dot8(s, l, x); }
#endif
inline Sums add(Sums a, Sums b) {
    for (int n = 0; n < 16; n++) a.v[n] += b.v[n];
    return a;
}
inline void store(int32_t* out, Sums s) { std::memcpy(out, s.v, 64); }
inline Sums fold(Sums total, Sums s, const uint8_t* group, int32_t sum) {
    for (int n = 0; n < 16; n++) total.v[n] += (group[n] & 15) * (s.v[n] - (group[n] >> 4) * sum);
    return total;
}
struct Repacking {
    const uint8_t* group;
    explicit Repacking(const uint8_t* g) : group(g) {}
    void store(uint8_t* out, const Line& q) const {
        for (int n = 0; n < 16; n++)
            for (int j = 0; j < 4; j++)
                out[4 * n + j] = uint8_t(128 + (group[n] & 15) * (int(q.b[4 * n + j]) - (group[n] >> 4)));
    }
};

#endif

}  // namespace
