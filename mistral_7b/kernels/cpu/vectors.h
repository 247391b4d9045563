// bfloat16 and float16 conversions, and vectors of 16 floats. Sums have the same order with all instruction sets.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// A vector in two halves. Compilers keep vectors that are wider than a register in memory, which is many times slower.
template <class V>
struct Two {
    using Number = std::decay_t<decltype(V()[0])>;
    static constexpr int HALF = sizeof(V) / sizeof(Number);
    V low, high;

    Number operator[](int i) const { return i < HALF ? low[i] : high[i - HALF]; }
    friend Two operator-(Two a) { return {-a.low, -a.high}; }
    template <class B>
    Two& operator+=(B b) { return *this = *this + b; }
    template <class B>
    Two& operator-=(B b) { return *this = *this - b; }
};
template <class V>
inline Two<V> two(V low, V high) { return {low, high}; }

#define IN_HALVES(op)                                                                                     \
    template <class V>                                                                                    \
    inline auto operator op(Two<V> a, Two<V> b) { return two(a.low op b.low, a.high op b.high); }         \
    template <class V>                                                                                    \
    inline auto operator op(Two<V> a, typename Two<V>::Number b) { return two(a.low op b, a.high op b); } \
    template <class V>                                                                                    \
    inline auto operator op(typename Two<V>::Number a, Two<V> b) { return two(a op b.low, a op b.high); }
IN_HALVES(+) IN_HALVES(-) IN_HALVES(*) IN_HALVES(/) IN_HALVES(&) IN_HALVES(>>) IN_HALVES(<<)
IN_HALVES(<) IN_HALVES(>) IN_HALVES(>=) IN_HALVES(==)
#undef IN_HALVES

// Registers of the widest kind, and vectors of 16 numbers made of them.
#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
using FloatRegister = float __attribute__((vector_size(REGISTER)));
using IntRegister = int32_t __attribute__((vector_size(REGISTER)));
template <class V>
using Sixteen = std::conditional_t<sizeof(V) == 64, V, std::conditional_t<sizeof(V) == 32, Two<V>, Two<Two<V>>>>;
using F16 = Sixteen<FloatRegister>;
using I16 = Sixteen<IntRegister>;
using B64 = uint8_t __attribute__((vector_size(64)));
using W32 = uint16_t __attribute__((vector_size(64)));

// The functions of a register, and below them those of more.
inline IntRegister bits_of(FloatRegister v) { return reinterpret_cast<IntRegister>(v); }
inline FloatRegister floats_of_bits(IntRegister v) { return reinterpret_cast<FloatRegister>(v); }
inline IntRegister to_ints(FloatRegister v) { return __builtin_convertvector(v, IntRegister); }
inline FloatRegister to_floats(IntRegister v) { return __builtin_convertvector(v, FloatRegister); }
template <class M, class V>
inline V select(M mask, V a, V b) { return mask ? a : b; }
inline float reduce_sum(FloatRegister v) {
    for (int n = REGISTER / 8; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
}
inline float reduce_max(FloatRegister v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
    float max = v[0];
    for (int i = 1; i < REGISTER / 4; i++) max = v[i] > max ? v[i] : max;
    return max;
#endif
}
// a b + c, rounded once on all CPUs, so that sums do not depend on the instruction set.
inline FloatRegister fmadd(FloatRegister a, FloatRegister b, FloatRegister c) {
#if defined(__AVX512F__)
    return reinterpret_cast<FloatRegister>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
    return reinterpret_cast<FloatRegister>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    for (int i = 0; i < REGISTER / 4; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
template <class V>
struct Memory {  // of numbers of another type
    template <class P>
    static V read(const P* p) {
        typedef P Numbers __attribute__((vector_size(sizeof(V) / 4 * sizeof(P))));
        Numbers v;
        std::memcpy(&v, p, sizeof v);
        return __builtin_convertvector(v, V);
    }
    template <class P>
    static void write(P* p, V from) {
        typedef P Numbers __attribute__((vector_size(sizeof(V) / 4 * sizeof(P))));
        const Numbers v = __builtin_convertvector(from, Numbers);
        std::memcpy(p, &v, sizeof v);
    }
};

template <class V>
inline auto bits_of(Two<V> v) { return two(bits_of(v.low), bits_of(v.high)); }
template <class V>
inline auto floats_of_bits(Two<V> v) { return two(floats_of_bits(v.low), floats_of_bits(v.high)); }
template <class V>
inline auto to_ints(Two<V> v) { return two(to_ints(v.low), to_ints(v.high)); }
template <class V>
inline auto to_floats(Two<V> v) { return two(to_floats(v.low), to_floats(v.high)); }
template <class M, class V>
inline Two<V> select(Two<M> mask, Two<V> a, Two<V> b) { return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)}; }
template <class V>
inline float reduce_sum(Two<V> v) { return reduce_sum(v.low + v.high); }
template <class V>
inline float reduce_max(Two<V> v) { return reduce_max(select(v.low > v.high, v.low, v.high)); }
template <class V>
inline Two<V> fmadd(Two<V> a, Two<V> b, Two<V> c) { return {fmadd(a.low, b.low, c.low), fmadd(a.high, b.high, c.high)}; }
template <class V>
struct Memory<Two<V>> {
    template <class P>
    static Two<V> read(const P* p) { return {Memory<V>::read(p), Memory<V>::read(p + Two<V>::HALF)}; }
    template <class P>
    static void write(P* p, Two<V> v) { Memory<V>::write(p, v.low), Memory<V>::write(p + Two<V>::HALF, v.high); }
};

inline FloatRegister load_register(const float* p) { return Memory<FloatRegister>::read(p); }
inline FloatRegister load_register(const uint16_t* p) { return floats_of_bits(Memory<IntRegister>::read(p) << 16); }

// Numbers of a and b in turn, of their lower or upper halves.
template <int FROM, size_t... I>
inline FloatRegister zipped(FloatRegister a, FloatRegister b, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (FROM + int(I) / 2 + int(I) % 2 * (REGISTER / 4))...);
#else  // GCC before 12 has no other
    return __builtin_shuffle(a, b, IntRegister{(FROM + int(I) / 2 + int(I) % 2 * (REGISTER / 4))...});
#endif
}
// Transposes a square. Each step rotates the bits of an element's address, which is its row, then its column, by one.
inline void transpose(FloatRegister (&square)[REGISTER / 4]) {
    constexpr int N = REGISTER / 4;
    constexpr auto all = std::make_index_sequence<N>();
    for (int step = 1; step < N; step *= 2) {
        FloatRegister next[N];
        for (int i = 0; i < N / 2; i++) {
            next[2 * i] = zipped<0>(square[i], square[i + N / 2], all);
            next[2 * i + 1] = zipped<N / 2>(square[i], square[i + N / 2], all);
        }
        for (int i = 0; i < N; i++) square[i] = next[i];
    }
}

// The numbers of a vector in memory, to change them one by one.
using Lane = float __attribute__((may_alias));
inline Lane* lanes(F16& v) { return reinterpret_cast<Lane*>(&v); }

inline F16 broadcast(float v) { return v - F16{}; }
inline F16 maximum(F16 a, F16 b) { return select(a > b, a, b); }
inline F16 load(const float* p) { return Memory<F16>::read(p); }
inline I16 load(const int32_t* p) { return Memory<I16>::read(p); }
inline F16 load(const int8_t* p) { return to_floats(Memory<I16>::read(p)); }
inline F16 load(const uint16_t* p) { return floats_of_bits(Memory<I16>::read(p) << 16); }
inline void store(float* p, F16 v) { Memory<F16>::write(p, v); }
inline void store(uint16_t* p, F16 v) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
    // The instruction differs for NaN, whose bits it keeps, and for subnormals, which it flushes to zero.
    if (!_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(v), 0xa1)) {
        const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
        std::memcpy(p, &h, 32);
        return;
    }
#endif
    const I16 bits = bits_of(v), round = bits + 0x7fff + ((bits >> 16) & 1);
    Memory<I16>::write(p, (select(v == v, round, I16{} + 0x7fc00000) >> 16) & 0xffff);
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

// e^x, within 2 ulp; 0 below -87, exactly 1 at 0.
inline F16 exponential(F16 x) {
    const F16 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = maximum(x, broadcast(-150.0f));
    x = select(x < 88.0f, x, broadcast(88.0f));
    F16 n = (x * 1.44269504088896341f + magic) - magic;
    F16 f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    F16 p = broadcast(1.9875691500e-4f);  // Cephes' expf
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    const I16 e = to_ints(n);
    return select(e < -126, F16{}, p * floats_of_bits((e + 127) << 23));
}

}  // namespace
