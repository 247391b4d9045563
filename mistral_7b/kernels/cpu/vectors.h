// bfloat16 and float16 conversions, and vectors of 16 floats. Sums have the same order with all instruction sets.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

float from_bf16(uint16_t h) {
    uint32_t bits = uint32_t(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

uint16_t to_bf16(float f) {  // round to nearest even, as in PyTorch
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_half(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    if (rest >= 0x7c00) {
        bits = 0x7f800000 | (rest & 0x3ff) << 13;
    } else {  // including subnormals: the multiplication corrects the exponent
        bits = rest << 13;
        float f;
        std::memcpy(&f, &bits, 4);
        f *= 5.192296858534828e33f;  // 2^112
        std::memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

struct F32 {
    using Store = float;
    static float load(const float* p, int64_t i) { return p[i]; }
    static void store(float* p, int64_t i, float v) { p[i] = v; }
};
struct BF16 {
    using Store = uint16_t;
    static float load(const uint16_t* p, int64_t i) { return from_bf16(p[i]); }
    static void store(uint16_t* p, int64_t i, float v) { p[i] = to_bf16(v); }
};

using F16 = float __attribute__((vector_size(64)));
using I16 = int32_t __attribute__((vector_size(64)));
using H16 = uint16_t __attribute__((vector_size(32)));
using B16 = uint8_t __attribute__((vector_size(16)));
using B64 = uint8_t __attribute__((vector_size(64)));
using W32 = uint16_t __attribute__((vector_size(64)));

inline F16 broadcast(float v) { return v - F16{}; }
inline F16 maximum(F16 a, F16 b) { return a > b ? a : b; }
inline F16 load(const float* p) {
    F16 v;
    std::memcpy(&v, p, 64);
    return v;
}
inline I16 load(const int32_t* p) {
    I16 v;
    std::memcpy(&v, p, 64);
    return v;
}
inline void store(float* p, F16 v) { std::memcpy(p, &v, 64); }
inline F16 to_float(H16 h) { return reinterpret_cast<F16>(__builtin_convertvector(h, I16) << 16); }
inline H16 to_bf16(F16 v) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
    // The instruction differs for NaN, whose bits it keeps, and for subnormals, which it flushes to zero.
    if (!_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(v), 0xa1))
        return reinterpret_cast<H16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#endif
    I16 bits = reinterpret_cast<I16>(v);
    I16 round = bits + 0x7fff + ((bits >> 16) & 1);
    round = v == v ? round : I16{} + 0x7fc00000;
    return __builtin_convertvector((round >> 16) & 0xffff, H16);
}
inline F16 load(const uint16_t* p) {
    H16 h;
    std::memcpy(&h, p, 32);
    return to_float(h);
}
inline void store(uint16_t* p, F16 v) {
    H16 h = to_bf16(v);
    std::memcpy(p, &h, 32);
}
inline F16 load(const int8_t* p) {
    int8_t __attribute__((vector_size(16))) b;
    std::memcpy(&b, p, 16);
    return __builtin_convertvector(__builtin_convertvector(b, I16), F16);
}
// The first n of 16 elements, the others zero, for the end of a row.
template <class P>
F16 load(const P* p, int64_t n) {
    if (n >= 16) return load(p);
    P buffer[16] = {};
    std::memcpy(buffer, p, n * sizeof(P));
    return load(buffer);
}
template <class P>
void store(P* p, F16 v, int64_t n) {
    if (n >= 16) return store(p, v);
    P buffer[16];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(P));
}
inline float reduce_sum(F16 v) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
}
// a b + c, rounded once on all CPUs, so that sums do not depend on the instruction set.
inline F16 fmadd(F16 a, F16 b, F16 c) {
#if defined(__AVX512F__)
    return reinterpret_cast<F16>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
    for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
inline float reduce_max(F16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
    float max = v[0];
    for (int i = 1; i < 16; i++) max = v[i] > max ? v[i] : max;
    return max;
#endif
}

// e^x, within 2 ulp; 0 below -87, exactly 1 at 0.
inline F16 exponential(F16 x) {
    const F16 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = maximum(x, broadcast(-150.0f));
    x = x < 88.0f ? x : broadcast(88.0f);
    F16 n = (x * 1.44269504088896341f + magic) - magic;
    F16 f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    F16 p = broadcast(1.9875691500e-4f);  // Cephes' expf
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    I16 e = __builtin_convertvector(n, I16);
    F16 power = reinterpret_cast<F16>((e + 127) << 23);
    return e < -126 ? F16{} : p * power;
}

}  // namespace
