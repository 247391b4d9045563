// What PyTorch has no fast operator for on a CPU: products with quantised weights.
//
//   M rows of activations · N outputs · K inputs · G groups of K
//
// A weight is stored in tiles of 16 outputs by 4 inputs, 64 bytes a line, so that one load feeds one
// vector instruction (vpdpbusd) and 16 lines are one AMX tile:
//
//   int8   codes[N/16][K/4][16][4]   byte (n, j) of line i   is q[n, 4i + j]                w8 = q - 128
//   int4   codes[N/16][K/8][16][4]   byte (n, j) of line i   is q[n, 8i + j] below, q[n, 8i + 4 + j] above
//          groups[N/16][G][16]       a byte                  is m below, z above            w8 = m (q - z)
//
// N is padded to 16 and K to 64 (and to whole groups); padded inputs meet activations that are zero.
// Activations become int8 a row at a time: sx = absmax / 127, xq = round(x / sx). Then
//
//   y[m, n] = float(sum_k xq[m, k] w8[n, k]) * sx[m] * scale[n]
//
// and since integer sums are exact, a row's result does not depend on the other rows, on the number of
// threads or on the instructions used. GGUF's blocks ("block") have a float scale for every 32 inputs, for
// activations too; their sums are added in the order of the blocks, whatever the path.
//
// The source is plain C++17 with a C interface: the widest instructions that the flags allow are taken.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__linux__)
#define WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE_N = 16, LINE = 64, BLOCK = 32;

// ---------------------------------------------------------------- numbers

float from_bf16(uint16_t h) {
    uint32_t bits = uint32_t(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

uint16_t to_bf16(float f) {  // round to nearest even, as PyTorch
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_half(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    if (rest >= 0x7c00) {
        bits = 0x7f800000 | (rest & 0x3ff) << 13;
    } else {  // subnormals too: the exponent is put right by a product
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
    static float get(const float* p, int64_t i) { return p[i]; }
    static void put(float* p, int64_t i, float v) { p[i] = v; }
};
struct BF16 {
    using Store = uint16_t;
    static float get(const uint16_t* p, int64_t i) { return from_bf16(p[i]); }
    static void put(uint16_t* p, int64_t i, float v) { p[i] = to_bf16(v); }
};

// ---------------------------------------------------------------- sixteen outputs at once

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
struct Widening {
    __m512i m, shift;
    explicit Widening(const uint8_t* group) {
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group)));
        const __m512i z = _mm512_srli_epi32(b, 4);
        m = _mm512_and_si512(b, _mm512_set1_epi32(15));
        shift = _mm512_and_si512(_mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_mullo_epi32(m, z)), _mm512_set1_epi32(255));
        shift = _mm512_mullo_epi32(shift, _mm512_set1_epi32(0x01010101));
        m = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));  // m q <= 225: two bytes multiply without a carry
    }
    void put(uint8_t* out, Line q) const { _mm512_storeu_si512(out, _mm512_add_epi8(_mm512_mullo_epi16(q, m), shift)); }
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
struct Widening {
    const uint8_t* group;
    explicit Widening(const uint8_t* g) : group(g) {}
    void put(uint8_t* out, const Line& q) const {
        for (int n = 0; n < 16; n++)
            for (int j = 0; j < 4; j++)
                out[4 * n + j] = uint8_t(128 + (group[n] & 15) * (int(q.b[4 * n + j]) - (group[n] >> 4)));
    }
};

#endif

// ---------------------------------------------------------------- memory and threads

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Scratch that is kept between calls: a step of decoding allocates nothing.
template <class T>
struct Scratch {
    std::unique_ptr<void, Free> held;
    size_t size = 0;
    T* get(size_t n) {
        if (n * sizeof(T) > size) {
            size = (n * sizeof(T) + 4095) / 4096 * 4096;
            held.reset();
            held.reset(std::aligned_alloc(4096, size));
            if (!held) {
                size = 0;
                throw std::bad_alloc();
            }
        }
        return static_cast<T*>(held.get());
    }
};

template <class F>
void parallel(int threads, F f) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        f(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    f(0, 1);
}

struct Span {
    int64_t begin, end;
};
Span share(int64_t n, int t, int threads) { return {n * t / threads, n * (t + 1) / threads}; }

// ---------------------------------------------------------------- sixteen floats at once

using F16 = float __attribute__((vector_size(64)));
using I16 = int32_t __attribute__((vector_size(64)));
using H16 = uint16_t __attribute__((vector_size(32)));

inline F16 all(float v) { return v - F16{}; }
inline F16 larger(F16 a, F16 b) { return a > b ? a : b; }
inline F16 take(const float* p) {
    F16 v;
    std::memcpy(&v, p, 64);
    return v;
}
inline void give(float* p, F16 v) { std::memcpy(p, &v, 64); }
inline F16 widened(H16 h) { return reinterpret_cast<F16>(__builtin_convertvector(h, I16) << 16); }
inline H16 narrowed(F16 v) {  // to bfloat16, to nearest even; NaN stays NaN
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
    // One instruction does it but for NaN, whose bits it keeps, and numbers below the normal ones, which it drops.
    if (!_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(v), 0xa1))
        return reinterpret_cast<H16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#endif
    I16 bits = reinterpret_cast<I16>(v);
    I16 round = bits + 0x7fff + ((bits >> 16) & 1);
    round = v == v ? round : I16{} + 0x7fc00000;
    return __builtin_convertvector((round >> 16) & 0xffff, H16);
}
inline F16 take(const uint16_t* p) {
    H16 h;
    std::memcpy(&h, p, 32);
    return widened(h);
}
inline void give(uint16_t* p, F16 v) {
    H16 h = narrowed(v);
    std::memcpy(p, &h, 32);
}
inline F16 take(const int8_t* p) {
    int8_t __attribute__((vector_size(16))) b;
    std::memcpy(&b, p, 16);
    return __builtin_convertvector(__builtin_convertvector(b, I16), F16);
}
// The first n of sixteen, the rest zero: one way for the end of a row and for its middle.
template <class P>
F16 take(const P* p, int64_t n) {
    if (n >= 16) return take(p);
    P some[16] = {};
    std::memcpy(some, p, n * sizeof(P));
    return take(some);
}
template <class P>
void give(P* p, F16 v, int64_t n) {
    if (n >= 16) return give(p, v);
    P some[16];
    give(some, v);
    std::memcpy(p, some, n * sizeof(P));
}
inline float total(F16 v) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
}
inline float largest(F16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
    float top = v[0];
    for (int i = 1; i < 16; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

// e^x, to 2 units in the last place; 0 below -87, exactly 1 at 0.
inline F16 exponential(F16 x) {
    const F16 magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    x = larger(x, all(-150.0f));
    x = x < 88.0f ? x : all(88.0f);
    F16 n = (x * 1.44269504088896341f + magic) - magic;
    F16 f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    F16 p = all(1.9875691500e-4f);  // Cephes' expf
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

// ---------------------------------------------------------------- activations

// Rows of int8 with a scale for every `block` inputs and, per `group` inputs, the sum of their codes.
struct Rows {
    int64_t M, K, Kp, block, group;
    int8_t* q;      // (M, Kp), padded with zeros; M itself is padded to 16 rows for AMX
    float* scale;   // (M, Kp / block)
    int32_t* sum;   // (M, Kp / group)
};

template <class T>
void quantise_row(const Rows& r, int64_t row, const typename T::Store* x) {
    int8_t* q = r.q + row * r.Kp;
    for (int64_t b = 0; b * r.block < r.Kp; b++) {
        const int64_t begin = b * r.block, end = std::max(begin, std::min(begin + r.block, r.K));
        uint32_t top = 0;  // the largest bits are the largest magnitude; those of inf and NaN lie above all
        for (int64_t k = begin; k < end; k++) {
            float v = T::get(x, k);
            uint32_t bits;
            std::memcpy(&bits, &v, 4);
            top = std::max(top, bits & 0x7fffffffu);
        }
        float absmax;
        std::memcpy(&absmax, &top, 4);
        r.scale[row * (r.Kp / r.block) + b] = absmax / 127.0f;
        const float inverse = absmax > 0 ? 127.0f / absmax : 0.0f;
        const bool finite = top < 0x7f800000u && inverse <= 3.0e38f;
        if (finite)
            for (int64_t k = begin; k < end; k++) q[k] = int8_t(int32_t(__builtin_rintf(T::get(x, k) * inverse)));
        else  // the scale is 0, inf or NaN, and so will the products be
            std::memset(q + begin, 0, end - begin);
    }
    std::memset(q + r.K, 0, r.Kp - r.K);
    for (int64_t g = 0; g * r.group < r.Kp; g++) {
        int32_t s = 0;
        for (int64_t k = g * r.group; k < (g + 1) * r.group; k++) s += q[k];
        r.sum[row * (r.Kp / r.group) + g] = s;
    }
}

// ---------------------------------------------------------------- weights

struct Weights {
    int64_t N, Kp, group;  // group: inputs of an int4 group; Kp for int8
    const uint8_t* codes;
    const uint8_t* groups;    // int4 only
    const float* scale;       // (N,)
    const uint16_t* d;        // block formats only: half floats [N/16][K/32][16]
    int bits;
};

// y = float(sums) * sx * scale, for the 16 outputs of a tile or what there is of them.
template <class T>
inline void finish(const Rows& r, const Weights& w, int64_t row, int64_t tile, const int32_t* sums, void* out) {
    I16 v;
    std::memcpy(&v, sums, 64);
    const F16 y = __builtin_convertvector(v, F16) * r.scale[row] * take(w.scale + tile * TILE_N);
    give(static_cast<typename T::Store*>(out) + row * w.N + tile * TILE_N, y, w.N - tile * TILE_N);
}

// Bytes ahead of a load at which memory is asked for: with two streams in each of two threads nothing was faster.
constexpr int64_t AHEAD = 4096;

// R rows by W tiles of 16 outputs, whose codes of 8 bits (128 is zero) lie `stride` bytes apart.
template <int R, int W>
void dot_tiles8(const Rows& r, int64_t row, const uint8_t* codes, int64_t stride, Sums (*out)[W]) {
    Sums s[R][W];  // a local, which stays in registers
    for (int i = 0; i < R; i++)
        for (int t = 0; t < W; t++) s[i][t] = zero();
    const int8_t* x = r.q + row * r.Kp;
    for (int64_t k = 0; k < r.Kp; k += 4, codes += LINE) {
        Line line[W];
        for (int t = 0; t < W; t++) {
            __builtin_prefetch(codes + t * stride + AHEAD);
            line[t] = load(codes + t * stride);
        }
        for (int t = 0; t < W; t++)
            for (int i = 0; i < R; i++) s[i][t] = dot8(s[i][t], line[t], x + i * r.Kp + k);
    }
    for (int i = 0; i < R; i++)
        for (int t = 0; t < W; t++) out[i][t] = s[i][t];
}

// The same from codes of 4 bits: sums of a group, then the group's multiplier and zero point.
template <int R, int W>
void dot_tiles4(const Rows& r, int64_t row, const uint8_t* codes, int64_t stride, const uint8_t* groups, int64_t group_stride, Sums (*out)[W]) {
    for (int i = 0; i < R; i++)
        for (int t = 0; t < W; t++) out[i][t] = zero();
    const int8_t* x = r.q + row * r.Kp;
    const int64_t G = r.Kp / r.group;
    for (int64_t g = 0; g < G; g++, x += r.group, groups += TILE_N) {
        Sums a[R][W], b[R][W];
        for (int i = 0; i < R; i++)
            for (int t = 0; t < W; t++) a[i][t] = b[i][t] = zero();
        for (int t = 0; t < W; t++) __builtin_prefetch(groups + t * group_stride + AHEAD / 16);
        for (int64_t k = 0; k < r.group; k += 8, codes += LINE) {
            Line line[W];
            for (int t = 0; t < W; t++) {
                __builtin_prefetch(codes + t * stride + AHEAD);
                line[t] = load(codes + t * stride);
            }
            for (int t = 0; t < W; t++)
                for (int i = 0; i < R; i++) {
                    a[i][t] = dot4(a[i][t], low(line[t]), x + i * r.Kp + k);
                    b[i][t] = dot4(b[i][t], high(line[t]), x + i * r.Kp + k + 4);
                }
        }
        for (int i = 0; i < R; i++)
            for (int t = 0; t < W; t++)
                out[i][t] = fold(out[i][t], add(a[i][t], b[i][t]), groups + t * group_stride, r.sum[(row + i) * G + g]);
    }
}

// The codes of one tile from int4 to int8, inputs begin..end, both multiples of 32.
inline void widen_tile(const Weights& w, int64_t tile, int64_t begin, int64_t end, uint8_t* out) {
    const uint8_t* codes = w.codes + tile * w.Kp * 8 + begin / 8 * LINE;
    const uint8_t* groups = w.groups + tile * (w.Kp / w.group) * TILE_N;
    for (int64_t k = begin; k < end;) {
        const uint8_t* group = groups + k / w.group * TILE_N;
        const Widening widen(group);
        __builtin_prefetch(group + AHEAD / 16);
        for (const int64_t stop = std::min(end, (k / w.group + 1) * w.group); k < stop; k += 8) {
            __builtin_prefetch(codes + AHEAD);
            const Line line = load(codes);
            widen.put(out, low(line));
            widen.put(out + LINE, high(line));
            codes += LINE;
            out += 2 * LINE;
        }
    }
}

constexpr int64_t FEW = 4;  // rows up to which weights are used as they lie, and beyond which int4 is widened first

// Tile `tile`, and with W = 2 the one `apart` tiles on. wide: the codes of a single tile, widened; else null.
template <class T, int R, int W>
void few_rows(const Rows& r, const Weights& w, int64_t row, int64_t tile, int64_t apart, const uint8_t* wide, void* out) {
    Sums s[R][W];
    int32_t v[16];
    const bool eight = wide || w.bits == 8;
    const int64_t G = r.Kp / r.group, size = w.Kp * TILE_N;  // bytes of a tile in 8 bits
    if (eight)
        dot_tiles8<R, W>(r, row, wide ? wide : w.codes + tile * size, apart * size, s);
    else
        dot_tiles4<R, W>(r, row, w.codes + tile * size / 2, apart * size / 2, w.groups + tile * G * TILE_N, apart * G * TILE_N, s);
    for (int i = 0; i < R; i++) {
        int32_t sum = 0;
        for (int64_t g = 0; eight && g < G; g++) sum += r.sum[(row + i) * G + g];
        for (int t = 0; t < W; t++) {
            store(v, s[i][t]);
            for (auto& n : v) n -= 128 * sum;
            finish<T>(r, w, row + i, tile + t * apart, v, out);
        }
    }
}

template <class T, int W>
void any_rows(const Rows& r, const Weights& w, int64_t tile, int64_t apart, const uint8_t* wide, void* out) {
    int64_t row = 0;
    for (; row + FEW <= r.M; row += FEW) few_rows<T, FEW, W>(r, w, row, tile, apart, wide, out);
    switch (r.M - row) {
        case 3: few_rows<T, 3, W>(r, w, row, tile, apart, wide, out); break;
        case 2: few_rows<T, 2, W>(r, w, row, tile, apart, wide, out); break;
        case 1: few_rows<T, 1, W>(r, w, row, tile, apart, wide, out); break;
        default: break;
    }
}

// ---------------------------------------------------------------- AMX: tiles of 16 rows by 16 outputs by 64 inputs

#if defined(WITH_AMX)

constexpr int64_t NB = 16, KB = 4096, MB = 512;  // of a block: tiles of outputs, inputs (1 MB of codes in L2), rows

void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

// The macros of tiles do not tell the compiler that they touch memory.
inline void fence() { __asm__ volatile("" ::: "memory"); }

inline void clear_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Tiles 0..3 += A B over `steps` tiles of inputs: 32 rows by up to 2 tiles of outputs.
inline void steps_2x2(const int8_t* a, int64_t lda, const uint8_t* b, int64_t ldb, int64_t steps, int64_t count) {
    fence();
    if (count < 2) ldb = 0;  // the one tile twice: its second result is not used
    for (int64_t i = 0; i < steps; i++) {
        for (int64_t line = (i + 2) * 1024; line < (i + 3) * 1024; line += LINE) {
            __builtin_prefetch(b + line);
            __builtin_prefetch(b + ldb + line);
        }
        _tile_loadd(4, a + i * 64, lda);
        _tile_loadd(6, b + i * 1024, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b + ldb + i * 1024, 64);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, a + 16 * lda + i * 64, lda);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    fence();
}

// The same for 16 rows by up to 4 tiles of outputs.
inline void steps_1x4(const int8_t* a, int64_t lda, const uint8_t* b, int64_t ldb, int64_t steps, int64_t count) {
    fence();
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(4, a + i * 64, lda);
        _tile_loadd(5, b + i * 1024, 64);
        _tile_dpbsud(0, 4, 5);
        if (count > 1) {
            _tile_loadd(6, b + ldb + i * 1024, 64);
            _tile_dpbsud(1, 4, 6);
        }
        if (count > 2) {
            _tile_loadd(7, b + 2 * ldb + i * 1024, 64);
            _tile_dpbsud(2, 4, 7);
        }
        if (count > 3) {
            _tile_loadd(5, b + 3 * ldb + i * 1024, 64);
            _tile_dpbsud(3, 4, 5);
        }
    }
    fence();
}

// Tiles 0..3 from memory, or back to it: C (32 rows, 32 outputs) if `two`, else (16, 16 times count).
inline void load_sums(const int32_t* c, int64_t ldc, bool two, int64_t count) {
    fence();
    const int64_t second = 16, third = two ? 16 * ldc : 32, fourth = two ? 16 * ldc + 16 : 48;
    _tile_loadd(0, c, ldc * 4);
    if (count > 1) _tile_loadd(1, c + second, ldc * 4);
    if (two || count > 2) _tile_loadd(2, c + third, ldc * 4);
    if (two ? count > 1 : count > 3) _tile_loadd(3, c + fourth, ldc * 4);
}
inline void store_sums(int32_t* c, int64_t ldc, bool two, int64_t count) {
    fence();
    const int64_t second = 16, third = two ? 16 * ldc : 32, fourth = two ? 16 * ldc + 16 : 48;
    _tile_stored(0, c, ldc * 4);
    if (count > 1) _tile_stored(1, c + second, ldc * 4);
    if (two || count > 2) _tile_stored(2, c + third, ldc * 4);
    if (two ? count > 1 : count > 3) _tile_stored(3, c + fourth, ldc * 4);
    fence();
}

// Rows begin..end by the tiles of one block of outputs, all inputs.
template <class T>
void amx_block(const Rows& r, const Weights& w, Span rows, Span tiles, uint8_t* panel, int32_t* c, void* out) {
    constexpr int64_t ldc = NB * TILE_N;
    const int64_t padded = (rows.end - rows.begin + 15) / 16 * 16;
    for (int64_t k = 0; k < w.Kp; k += KB) {
        const int64_t depth = std::min(KB, w.Kp - k), steps = depth / 64;
        const uint8_t* b = w.codes + tiles.begin * w.Kp * TILE_N + k * TILE_N;
        int64_t ldb = w.Kp * TILE_N;
        if (w.bits == 4) {
            for (int64_t t = tiles.begin; t < tiles.end; t++)
                widen_tile(w, t, k, k + depth, panel + (t - tiles.begin) * depth * TILE_N);
            b = panel;
            ldb = depth * TILE_N;
        }
        const int64_t width = tiles.end - tiles.begin;
        for (int64_t m = 0; m < padded;) {
            const int8_t* a = r.q + (rows.begin + m) * r.Kp + k;
            const bool two = padded - m >= 32;
            for (int64_t t = 0; t < width; t += two ? 2 : 4) {
                const int64_t count = std::min(width - t, int64_t(two ? 2 : 4));
                int32_t* at = c + m * ldc + t * 16;
                clear_tiles();
                if (k) load_sums(at, ldc, two, count);
                two ? steps_2x2(a, r.Kp, b + t * ldb, ldb, steps, count) : steps_1x4(a, r.Kp, b + t * ldb, ldb, steps, count);
                store_sums(at, ldc, two, count);
            }
            m += two ? 32 : 16;
        }
    }
    for (int64_t m = rows.begin; m < rows.end; m++) {
        int32_t sum = 0;
        for (int64_t g = 0; g < r.Kp / r.group; g++) sum += r.sum[m * (r.Kp / r.group) + g];
        for (int64_t t = tiles.begin; t < tiles.end; t++) {
            int32_t* v = c + (m - rows.begin) * ldc + (t - tiles.begin) * 16;
            for (int i = 0; i < 16; i++) v[i] -= 128 * sum;
            finish<T>(r, w, m, t, v, out);
        }
    }
}

// Up to 16 MT rows by `count` tiles of outputs (up to 4 / MT), all inputs: codes are widened just before they are
// used, while the matrix unit still works on those before.
template <class T, int MT>
void amx_few(const Rows& r, const Weights& w, int64_t row, int64_t tile, int64_t count, void* out) {
    constexpr int64_t CHUNK = 128;
    alignas(64) uint8_t room[4 / MT * CHUNK * TILE_N];
    alignas(64) int32_t c[16 * MT * 64 / MT];
    constexpr int64_t ldc = 64 / MT;
    const int8_t* a = r.q + row * r.Kp;
    for (int64_t k = 0; k < w.Kp; k += CHUNK) {
        const int64_t depth = std::min(CHUNK, w.Kp - k);
        const uint8_t* b = w.codes + tile * w.Kp * TILE_N + k * TILE_N;
        int64_t ldb = w.Kp * TILE_N;
        if (w.bits == 4) {
            ldb = depth * TILE_N;
            for (int64_t t = 0; t < count; t++) widen_tile(w, tile + t, k, k + depth, room + t * ldb);
            b = room;
        } else {
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 0; i < depth * TILE_N; i += LINE) __builtin_prefetch(b + t * ldb + i + AHEAD);
        }
        if (k == 0) clear_tiles();
        MT == 1 ? steps_1x4(a + k, r.Kp, b, ldb, depth / 64, count) : steps_2x2(a + k, r.Kp, b, ldb, depth / 64, count);
    }
    store_sums(c, ldc, MT == 2, count);
    for (int64_t m = 0; m < std::min(int64_t(16 * MT), r.M - row); m++) {
        int32_t sum = 0;
        for (int64_t g = 0; g < r.Kp / r.group; g++) sum += r.sum[(row + m) * (r.Kp / r.group) + g];
        for (int64_t t = 0; t < count; t++) {
            int32_t* v = c + m * ldc + t * 16;
            for (int i = 0; i < 16; i++) v[i] -= 128 * sum;
            finish<T>(r, w, row + m, tile + t, v, out);
        }
    }
}

template <class T>
void amx_linear(const Rows& r, const Weights& w, int threads, void* out) {
    const int64_t tiles = (w.N + 15) / 16;
    if (r.M <= 32) {
        const int64_t width = r.M <= 16 ? 4 : 2, blocks = (tiles + width - 1) / width;
        parallel(threads, [&](int t, int n) {
            configure_tiles();
            const Span mine = share(blocks, t, n);
            for (int64_t b = mine.begin; b < mine.end; b++) {
                const int64_t tile = b * width, count = std::min(width, tiles - tile);
                width == 4 ? amx_few<T, 1>(r, w, 0, tile, count, out) : amx_few<T, 2>(r, w, 0, tile, count, out);
            }
            _tile_release();
        });
        return;
    }
    // Blocks of outputs, smaller where there would be too few to share.
    int64_t width = NB;
    while (width > 4 && (tiles + width - 1) / width < 4 * threads) width /= 2;
    const int64_t blocks = (tiles + width - 1) / width;
    parallel(threads, [&](int t, int n) {
        static thread_local Scratch<uint8_t> panel_of;
        static thread_local Scratch<int32_t> sums_of;
        uint8_t* panel = panel_of.get(NB * TILE_N * KB);
        int32_t* c = sums_of.get(MB * NB * TILE_N);
        configure_tiles();
        const Span mine = share(blocks, t, n);
        for (int64_t b = mine.begin; b < mine.end; b++)
            for (int64_t m = 0; m < r.M; m += MB)
                amx_block<T>(r, w, {m, std::min(m + MB, r.M)}, {b * width, std::min((b + 1) * width, tiles)}, panel, c, out);
        _tile_release();
    });
}

#endif

// M rows made int8, in scratch that the next call takes again: a scale for `block` inputs, a sum for `group`.
template <class T>
Rows quantise(const void* x, int64_t M, int64_t K, int64_t Kp, int64_t block, int64_t group, int threads) {
    static thread_local Scratch<int8_t> codes_of;
    static thread_local Scratch<float> scale_of;
    static thread_local Scratch<int32_t> sum_of;
    const int64_t padded = (M + 15) / 16 * 16;
    const Rows r{M, K, Kp, block, group, codes_of.get(padded * Kp), scale_of.get(M * (Kp / block)), sum_of.get(M * (Kp / group))};
    const auto* rows = static_cast<const typename T::Store*>(x);
    parallel(M < 4 ? 1 : threads, [&](int t, int n) {
        const Span mine = share(M, t, n);
        for (int64_t m = mine.begin; m < mine.end; m++) quantise_row<T>(r, m, rows + m * K);
    });
    std::memset(r.q + M * Kp, 0, (padded - M) * Kp);
    return r;
}

// Tiles begin..end of out (M, N) = rows w8^T, by one thread and without AMX.
template <class T>
void product_tiles(const Rows& r, const Weights& w, Span tiles, void* out) {
    static thread_local Scratch<uint8_t> wide_of;
    uint8_t* wide = w.bits == 4 && r.M > FEW ? wide_of.get(w.Kp * TILE_N) : nullptr;
    int64_t tile = tiles.begin;
    if (!wide) {  // two streams, one through each half: what is asked for ahead is always what comes next
        const int64_t half = (tiles.end - tiles.begin) / 2;
        for (; tile < tiles.begin + half; tile++) any_rows<T, 2>(r, w, tile, half, nullptr, out);
        tile += half;
    }
    for (; tile < tiles.end; tile++) {
        if (wide) widen_tile(w, tile, 0, w.Kp, wide);
        any_rows<T, 1>(r, w, tile, 0, wide, out);
    }
}

// The same rows by several weights of one form. Their tiles are shared out together: a thread waits but once.
template <class T>
void products(const Rows& r, const Weights* const* weights, int64_t n, int threads, void* const* outs) {
#if defined(WITH_AMX)
    if (r.M > FEW) {
        for (int64_t i = 0; i < n; i++) amx_linear<T>(r, *weights[i], threads, outs[i]);
        return;
    }
#endif
    int64_t all = 0;
    for (int64_t i = 0; i < n; i++) all += (weights[i]->N + 15) / 16;
    parallel(threads, [&](int t, int of) {
        const Span mine = share(all, t, of);
        int64_t first = 0;
        for (int64_t i = 0; i < n; i++) {
            const int64_t tiles = (weights[i]->N + 15) / 16;
            const Span part{std::max(mine.begin - first, int64_t(0)), std::min(mine.end - first, tiles)};
            if (part.begin < part.end) product_tiles<T>(r, *weights[i], part, outs[i]);
            first += tiles;
        }
    });
}

// ---------------------------------------------------------------- products with blocks of 32 (GGUF's Q8_0 and Q4_0)

// R rows by one tile: each block's integer sum times its two scales, added in the order of the blocks.
template <class T, int R>
void block_tile(const Rows& r, const Weights& w, int64_t row, int64_t tile, void* out) {
    F16 y[R] = {};
    const uint8_t* codes = w.codes + tile * w.Kp * 2 * w.bits;
    const uint16_t* d = w.d + tile * (w.Kp / BLOCK) * TILE_N;
    const int64_t G = w.Kp / BLOCK;
    for (int64_t g = 0; g < G; g++, d += TILE_N) {
        Sums s[R];
        for (auto& v : s) v = zero();
        const int8_t* x = r.q + row * r.Kp + g * BLOCK;
        for (int64_t k = 0; k < BLOCK; codes += LINE) {
            __builtin_prefetch(codes + AHEAD);
            const Line line = load(codes);
            if (w.bits == 8) {
                for (int i = 0; i < R; i++) s[i] = dot8(s[i], line, x + i * r.Kp + k);
                k += 4;
            } else {
                const Line lo = low(line), hi = high(line);
                for (int i = 0; i < R; i++) s[i] = dot4(dot4(s[i], lo, x + i * r.Kp + k), hi, x + i * r.Kp + k + 4);
                k += 8;
            }
        }
        F16 scale;
        for (int n = 0; n < 16; n++) scale[n] = from_half(d[n]);
        for (int i = 0; i < R; i++) {
            I16 v;
            store(reinterpret_cast<int32_t*>(&v), s[i]);
            v -= (w.bits == 8 ? 128 : 8) * r.sum[(row + i) * G + g];
            y[i] += __builtin_convertvector(v, F16) * (scale * r.scale[(row + i) * G + g]);
        }
    }
    for (int i = 0; i < R; i++)
        give(static_cast<typename T::Store*>(out) + (row + i) * w.N + tile * TILE_N, y[i], w.N - tile * TILE_N);
}

template <class T>
void block_product(const Rows& r, const Weights& w, int threads, void* out) {
    const int64_t tiles = (w.N + 15) / 16;
    parallel(threads, [&](int t, int n) {
        const Span mine = share(tiles, t, n);
        for (int64_t tile = mine.begin; tile < mine.end; tile++) {
            int64_t row = 0;
            for (; row + 4 <= r.M; row += 4) block_tile<T, 4>(r, w, row, tile, out);
            for (; row < r.M; row++) block_tile<T, 1>(r, w, row, tile, out);
        }
    });
}

// One x (M, K) by several weights; those of one form share its int8 form, and the threads' work.
template <class T>
void linears(const void* x, int64_t M, int64_t K, std::initializer_list<const Weights*> weights, int threads, std::initializer_list<void*> outs) {
    const Weights* const* w = weights.begin();
    void* const* out = outs.begin();
    for (const auto* end = weights.end(); w != end;) {
        int64_t n = 1;
        while (w + n != end && w[n]->Kp == w[0]->Kp && w[n]->group == w[0]->group && w[n]->bits == w[0]->bits && !w[n]->d == !w[0]->d) n++;
        const int most = M * w[0]->N * w[0]->Kp < 1 << 18 ? 1 : threads;  // waking another thread would take longer
        const Rows r = quantise<T>(x, M, K, w[0]->Kp, w[0]->d ? BLOCK : w[0]->Kp, w[0]->group, most);
        if (w[0]->d)
            for (int64_t i = 0; i < n; i++) block_product<T>(r, *w[i], most, out[i]);
        else
            products<T>(r, w, n, most, out);
        w += n;
        out += n;
    }
}

// ---------------------------------------------------------------- what lies between the products

// y = cast(x / sqrt(mean(x^2) + eps)) * weight, a row at a time; sums in one order whatever the batch.
template <class T>
void rms_norm(const typename T::Store* x, const typename T::Store* weight, int64_t M, int64_t D, float eps, int threads, typename T::Store* y) {
    parallel(M * D < 1 << 16 ? 1 : threads, [&](int t, int n) {
        const Span mine = share(M, t, n);
        for (int64_t m = mine.begin; m < mine.end; m++) {
            const auto* row = x + m * D;
            auto* out = y + m * D;
            F16 sum[4] = {};
            for (int64_t d = 0; d < D; d += 64)
                for (int u = 0; u < 4 && d + 16 * u < D; u++) {
                    F16 v = take(row + d + 16 * u, D - d - 16 * u);
                    sum[u] += v * v;
                }
            const float mean = total((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(D);
            const F16 r = all(1.0f / __builtin_sqrtf(mean + eps));
            for (int64_t d = 0; d < D; d += 16) {
                typename T::Store cast[16];
                give(cast, take(row + d, D - d) * r);
                give(out + d, take(cast) * take(weight + d, D - d), D - d);
            }
        }
    });
}

// silu(gate) * up, each rounded to its type as PyTorch does.
template <class T>
void silu_mul(const typename T::Store* gate, const typename T::Store* up, int64_t n, int threads, typename T::Store* y) {
    const int64_t lines = (n + 15) / 16;
    parallel(n < 1 << 15 ? 1 : threads, [&](int t, int of) {
        const Span mine = share(lines, t, of);
        for (int64_t i = mine.begin * 16; i < std::min(n, mine.end * 16); i += 16) {
            F16 g = take(gate + i, n - i);
            typename T::Store cast[16];
            give(cast, g / (1.0f + exponential(-g)));
            give(y + i, take(cast) * take(up + i, n - i), n - i);
        }
    });
}

// a + b, rounded to its type.
template <class T>
void add(const typename T::Store* a, const typename T::Store* b, int64_t n, int threads, typename T::Store* y) {
    const int64_t lines = (n + 15) / 16;
    parallel(n < 1 << 16 ? 1 : threads, [&](int t, int of) {
        const Span mine = share(lines, t, of);
        for (int64_t i = mine.begin * 16; i < std::min(n, mine.end * 16); i += 16) give(y + i, take(a + i, n - i) + take(b + i, n - i), n - i);
    });
}

// Neighbours (2i, 2i + 1) of each head turned by the angle whose cos and sin stand at its row: (M, heads, D).
template <class T>
void rotate(const typename T::Store* x, const float* cos, const float* sin, int64_t M, int64_t angles, int64_t heads, int64_t D, int threads, typename T::Store* y) {
    parallel(M * heads * D < 1 << 16 ? 1 : threads, [&](int t, int n) {
        const Span mine = share(M, t, n);
        for (int64_t m = mine.begin; m < mine.end; m++) {
            const float *c = cos + m % angles * (D / 2), *s = sin + m % angles * (D / 2);
            for (int64_t h = 0; h < heads; h++) {
                const auto* in = x + (m * heads + h) * D;
                auto* out = y + (m * heads + h) * D;
                for (int64_t i = 0; i < D / 2; i++) {
                    const float even = T::get(in, 2 * i), odd = T::get(in, 2 * i + 1);
                    T::put(out, 2 * i, even * c[i] - odd * s[i]);
                    T::put(out, 2 * i + 1, even * s[i] + odd * c[i]);
                }
            }
        }
    });
}

// ---------------------------------------------------------------- attention

// Softmax(Q K^T / sqrt(D)) V of bfloat16 queries, where a key is visible if 0 <= p_q - p_k < window.
//
// Keys are worked through in blocks of 64 positions that begin at multiples of 64, and each row keeps its own
// maximum and sum: so a row's result depends on its keys alone, not on the chunk it came in, on where its keys
// lie, or on the rows beside it. A row for which a block shows nothing is left as it is, to the bit.
//
// The queries of all sequences lie one after another, as many of each as it has: a row of decoding beside a chunk of
// a prompt. A rectangle is the case of equal numbers.

// Which queries there are, and where what came before them lies: the same for all layers.
struct Place {
    int64_t B, N;            // sequences, queries of all together
    const int64_t* offsets;  // (B + 1): those of sequence b are rows offsets[b]..offsets[b + 1]; null: N / B of each
    const int64_t* start;    // (B): position of the first of them
    const int64_t* held;     // (B): how many positions before it are remembered
    int64_t slots, origin;   // position p of sequence b lies at row b * slots + (p - origin) % slots ...
    const int64_t* table;    // ... or, in pages, at table[b * columns + p / page] * page + p % page
    int64_t columns, page;
    int64_t window;          // 0: none
};

struct Attend : Place {
    int64_t H, G, D;         // query heads, key heads, width
    const uint16_t* q;       // (N, H, D)
    const void *k, *v;       // (N, G, D): the queries' own keys and values, bfloat16 or int8
    const float *ks, *vs;    // (N, G): their scales, int8 only
    void *old_k, *old_v;     // (slots in all, G, D): what is remembered, and where the new goes if `keep`
    float *old_ks, *old_vs;
    bool keep, int8;
    uint16_t* out;           // (N, H, D)
};

inline int64_t first_row(const Place& a, int64_t b) { return a.offsets ? a.offsets[b] : a.N / a.B * b; }

// The first position that a query at position p sees, of those that are there.
inline int64_t first_key(const Place& a, int64_t b, int64_t p) {
    const int64_t oldest = std::max(int64_t(0), a.start[b] - a.held[b]);
    return a.window ? std::max(oldest, p - a.window + 1) : oldest;
}

constexpr int64_t KEYS = 64, MOST_ROWS = 128;

struct Room {  // what one thread works in
    int64_t D32;
    uint16_t *k, *v, *q, *p, *line;  // AMX's layouts: k (D/2, 64, 2), v (32, D, 2), q (rows, D), p (rows, 64)
    float *kf, *vf;                  // else: k (D, 64), v (64, D)
    float *s, *o, *top, *sum, *ks, *vs;
};

inline int64_t slot_of(const Place& a, int64_t b, int64_t p) {
    return a.table ? a.table[b * a.columns + p / a.page] * a.page + p % a.page : b * a.slots + (p - a.origin) % a.slots;
}

// Where the keys of 64 positions lie: rows of (.., G, D), the first `old` of them remembered and the rest the chunk's own.
struct Places {
    int64_t first, last, old;  // of the block's keys, those that are there; from `old` on the queries' own
    int64_t row[KEYS];
};

inline void find_block(const Place& a, int64_t b, int64_t block, int64_t begin, int64_t end, Places& at) {
    at.first = std::max(begin - block, int64_t(0));
    at.last = std::max(at.first, std::min(end - block, KEYS));
    at.old = std::min(std::max(a.start[b] - block, at.first), at.last);
    for (int64_t j = at.first; j < at.old; j++) {  // a division for each would take longer than the rest
        const bool next = j > at.first && (a.table ? (block + j) % a.page : at.row[j - 1] + 1 - b * a.slots) != (a.table ? 0 : a.slots);
        at.row[j] = next ? at.row[j - 1] + 1 : slot_of(a, b, block + j);
    }
    for (int64_t j = at.old; j < at.last; j++) at.row[j] = first_row(a, b) + block + j - a.start[b];
}

// Asks for the remembered keys and values of heads g0..g1: rows lie too far apart for the CPU's own prefetchers.
inline void ask_for_block(const Attend& a, const Places& at, int64_t g0, int64_t g1) {
    const int64_t size = a.D * (a.int8 ? 1 : 2), bytes = (g1 - g0) * size;
    for (int64_t j = at.first; j < at.old; j++)
        for (int64_t i = 0, from = (at.row[j] * a.G + g0) * size; i < bytes; i += 64) {
            __builtin_prefetch(static_cast<const char*>(a.old_k) + from + i, 0, 2);
            __builtin_prefetch(static_cast<const char*>(a.old_v) + from + i, 0, 2);
        }
}

// int8's whole numbers as bfloat16, in which they are exact.
inline void read_codes(const int8_t* codes, int64_t n, uint16_t* out) {
    int64_t d = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    for (; d + 32 <= n; d += 32) {
        const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + d)));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(wide)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(wide, 1)));
        _mm512_storeu_si512(out + d, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
#endif
    for (; d < n; d++) out[d] = to_bf16(float(codes[d]));
}

// Keys or values of one head to rows of D32, with their scales; zeros where there are none, which must be no NaN.
inline void read_block(const Attend& a, const Places& at, bool value, int64_t g, int64_t D32, uint16_t* line, float* scale) {
    for (int64_t j = 0; j < KEYS; j++, line += D32) {
        scale[j] = 0.0f;
        if (j < at.first || j >= at.last) {
            std::memset(line, 0, a.D * 2);
            continue;
        }
        const bool own = j >= at.old;
        const int64_t row = at.row[j] * a.G + g;
        const void* from = own ? (value ? a.v : a.k) : (value ? a.old_v : a.old_k);
        if (a.int8) {
            read_codes(static_cast<const int8_t*>(from) + row * a.D, a.D, line);
            scale[j] = (own ? (value ? a.vs : a.ks) : (value ? a.old_vs : a.old_ks))[row];
        } else {
            const uint16_t* numbers = static_cast<const uint16_t*>(from) + row * a.D;
            if (a.D == 128)
                std::memcpy(line, numbers, 256);  // of a size that is known, it is no call
            else
                std::memcpy(line, numbers, a.D * 2);
            scale[j] = 1.0f;
        }
    }
}

#if defined(WITH_AMX)

// 16 rows of 16 dwords turned over: out[i][j] = in[j][i].
inline void turn(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * out_stride, r[i]);
}

// Two rows of 32 to pairs: (a0, b0, a1, b1, ...).
inline void pair_rows(const uint16_t* a, const uint16_t* b, uint16_t* out) {
    alignas(64) static const struct Order {
        uint16_t first[32], second[32];
        Order() {
            for (int i = 0; i < 16; i++) {
                first[2 * i] = i, first[2 * i + 1] = 32 + i;
                second[2 * i] = 16 + i, second[2 * i + 1] = 48 + i;
            }
        }
    } order;
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(x, _mm512_load_si512(order.first), y));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(x, _mm512_load_si512(order.second), y));
}

void place_block(const Room& r) {  // r.line (2, 64, D32): keys, then values
    for (int64_t j = 0; j < KEYS; j += 16)
        for (int64_t d = 0; d < r.D32; d += 32)
            turn(reinterpret_cast<uint32_t*>(r.line + j * r.D32 + d), r.D32 / 2, reinterpret_cast<uint32_t*>(r.k) + d / 2 * KEYS + j, KEYS);
    const uint16_t* values = r.line + KEYS * r.D32;
    for (int64_t j = 0; j < KEYS; j += 2)
        for (int64_t d = 0; d < r.D32; d += 32)
            pair_rows(values + j * r.D32 + d, values + (j + 1) * r.D32 + d, r.v + j * r.D32 + 2 * d);
}

// C (16, 64) = A (16, depth) B: A by rows of lda, B (depth / 2, columns, 2) with `ldb` columns; added to C unless first.
void product(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, bool first, int64_t count) {
    fence();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!first) {
        _tile_loadd(0, c, ldc * 4);
        if (count > 1) _tile_loadd(1, c + 16, ldc * 4);
        if (count > 2) _tile_loadd(2, c + 32, ldc * 4);
        if (count > 3) _tile_loadd(3, c + 48, ldc * 4);
    }
    for (int64_t i = 0; i < depth; i += 32) {
        const uint16_t* at = b + i * ldb;
        _tile_loadd(4, a + i, lda * 2);
        _tile_loadd(5, at, ldb * 4);
        _tile_dpbf16ps(0, 4, 5);
        if (count > 1) {
            _tile_loadd(6, at + 32, ldb * 4);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (count > 2) {
            _tile_loadd(7, at + 64, ldb * 4);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (count > 3) {
            _tile_loadd(5, at + 96, ldb * 4);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, c, ldc * 4);
    if (count > 1) _tile_stored(1, c + 16, ldc * 4);
    if (count > 2) _tile_stored(2, c + 32, ldc * 4);
    if (count > 3) _tile_stored(3, c + 48, ldc * 4);
    fence();
}

void scores(const Room& r, int64_t rows) {
    for (int64_t m = 0; m < rows; m += 16) product(r.q + m * r.D32, r.D32, r.k, KEYS, r.D32, r.s + m * KEYS, KEYS, true, 4);
}

void add_values(const Room& r, int64_t rows) {
    for (int64_t m = 0; m < rows; m += 16)
        for (int64_t d = 0; d < r.D32; d += 64)
            product(r.p + m * KEYS, KEYS, r.v + 2 * d, r.D32, KEYS, r.o + m * r.D32 + d, r.D32, false, (r.D32 - d) / 16);
}

#else

void place_block(const Room& r) {
    const uint16_t* values = r.line + KEYS * r.D32;
    for (int64_t j = 0; j < KEYS; j++)
        for (int64_t d = 0; d < r.D32; d++) {
            r.kf[d * KEYS + j] = from_bf16(r.line[j * r.D32 + d]);
            r.vf[j * r.D32 + d] = from_bf16(values[j * r.D32 + d]);
        }
}

void scores(const Room& r, int64_t rows) {
    for (int64_t m = 0; m < rows; m++) {
        F16 s[4] = {};
        for (int64_t d = 0; d < r.D32; d++) {
            const float q = from_bf16(r.q[m * r.D32 + d]);
            for (int i = 0; i < 4; i++) s[i] += q * take(r.kf + d * KEYS + 16 * i);
        }
        for (int i = 0; i < 4; i++) give(r.s + m * KEYS + 16 * i, s[i]);
    }
}

void add_values(const Room& r, int64_t rows) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t d = 0; d < r.D32; d += 16) {
            F16 o = take(r.o + m * r.D32 + d);
            for (int64_t j = 0; j < KEYS; j++) o += from_bf16(r.p[m * KEYS + j]) * take(r.vf + j * r.D32 + d);
            give(r.o + m * r.D32 + d, o);
        }
}

#endif

// Scores of one row, keys first..last of the block visible: to probabilities, with the row's maximum and sum.
void soften(const Room& r, int64_t m, int64_t first, int64_t last, float scale) {
    if (first >= last) {
        std::memset(r.p + m * KEYS, 0, KEYS * 2);
        return;
    }
    float* row = r.s + m * KEYS;
    const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    F16 s[4], top = all(-3.0e38f);
    for (int i = 0; i < 4; i++) {
        s[i] = take(row + 16 * i) * scale * take(r.ks + 16 * i);
        const I16 key = lane + 16 * i;
        s[i] = (key >= int32_t(first)) & (key < int32_t(last)) ? s[i] : all(-3.0e38f);
        top = larger(top, s[i]);
    }
    const float before = r.top[m], now = std::max(before, largest(top));
    if (now > before) {
        const F16 shrink = exponential(all(before - now));
        float* o = r.o + m * r.D32;
        for (int64_t d = 0; d < r.D32; d += 16) give(o + d, take(o + d) * shrink);
        give(r.sum + 16 * m, take(r.sum + 16 * m) * shrink);
        r.top[m] = now;
    }
    F16 sum = take(r.sum + 16 * m);
    for (int i = 0; i < 4; i++) {
        const F16 e = exponential(s[i] - now);
        sum += e;
        give(r.p + m * KEYS + 16 * i, e * take(r.vs + 16 * i));
    }
    give(r.sum + 16 * m, sum);
}

// A piece of work: queries t0..t1 of sequence b, for the query heads of key heads g0..g1.
struct Unit {
    int64_t b, t0, t1, g0, g1;
    int64_t cost;  // of one of these heads, about
};

void attend_rows(const Attend& a, const Room& r, const Unit& u) {
    const int64_t R = a.H / a.G, rows = (u.t1 - u.t0) * R, padded = (rows + 15) / 16 * 16, all_rows = (u.g1 - u.g0) * padded;
    const float scale = 1.0f / __builtin_sqrtf(float(a.D));
    const int64_t start = a.start[u.b], end = start + u.t1, begin = first_key(a, u.b, start + u.t0), query0 = first_row(a, u.b) + u.t0;
    auto head_of = [&](int64_t g) {  // each head has rows of its own in the room
        Room own = r;
        const int64_t first = (g - u.g0) * padded;
        own.q += first * r.D32, own.o += first * r.D32, own.top += first, own.sum += first * 16;
        return own;
    };
    auto query = [&](int64_t m, int64_t g) { return ((query0 + m / R) * a.H + g * R + m % R) * a.D; };
    Places places[2];
    Places *now = places, *next = places + 1;
    find_block(a, u.b, begin / KEYS * KEYS, begin, end, *now);
    ask_for_block(a, *now, u.g0, u.g1);
    std::memset(r.q, 0, all_rows * r.D32 * 2);
    std::memset(r.o, 0, all_rows * r.D32 * 4);
    std::memset(r.sum, 0, all_rows * 64);
    std::memset(r.p, 0, padded * KEYS * 2);
    for (int64_t m = 0; m < all_rows; m++) r.top[m] = -3.0e38f;
    for (int64_t g = u.g0; g < u.g1; g++)
        for (int64_t m = 0; m < rows; m++) std::memcpy(head_of(g).q + m * r.D32, a.q + query(m, g), a.D * 2);
    for (int64_t block = begin / KEYS * KEYS; block < end; block += KEYS, std::swap(now, next)) {
        find_block(a, u.b, block + KEYS, begin, end, *next);
        for (int64_t g = u.g0; g < u.g1; g++) {
            const Room own = head_of(g);
            read_block(a, *now, false, g, r.D32, r.line, r.ks);
            read_block(a, *now, true, g, r.D32, r.line + KEYS * r.D32, r.vs);
            if (g == u.g0) ask_for_block(a, *next, u.g0, u.g1);
            place_block(own);
            scores(own, padded);
            for (int64_t p = start + u.t0, m = 0; p < end; p++) {
                const int64_t first = std::max(int64_t(0), first_key(a, u.b, p) - block), last = std::min(KEYS, p + 1 - block);
                for (const int64_t stop = m + R; m < stop; m++) soften(own, m, first, last, scale);
            }
            add_values(own, padded);
        }
    }
    for (int64_t g = u.g0; g < u.g1; g++)
        for (int64_t m = 0; m < rows; m++) {
            const Room own = head_of(g);
            const F16 sum = all(total(take(own.sum + 16 * m)));
            for (int64_t d = 0; d < a.D; d += 16) give(a.out + query(m, g) + d, take(own.o + m * r.D32 + d) / sum, a.D - d);
        }
}

// The new keys and values to their places among the remembered: of a chunk longer than a ring, its end.
void remember(const Attend& a, int threads) {
    const int64_t row = a.G * a.D * (a.int8 ? 1 : 2);
    parallel(a.N * row < 1 << 17 ? 1 : threads, [&](int thread, int n) {
        const Span mine = share(a.N, thread, n);
        for (int64_t b = 0; b < a.B; b++) {
            const int64_t first = first_row(a, b), end = first_row(a, b + 1), kept = a.table ? first : std::max(first, end - a.slots);
            for (int64_t from = std::max(mine.begin, kept); from < std::min(mine.end, end); from++) {
                const int64_t to = slot_of(a, b, a.start[b] + from - first);
                std::memcpy(static_cast<char*>(a.old_k) + to * row, static_cast<const char*>(a.k) + from * row, row);
                std::memcpy(static_cast<char*>(a.old_v) + to * row, static_cast<const char*>(a.v) + from * row, row);
                if (a.int8) {
                    std::memcpy(a.old_ks + to * a.G, a.ks + from * a.G, a.G * 4);
                    std::memcpy(a.old_vs + to * a.G, a.vs + from * a.G, a.G * 4);
                }
            }
        }
    });
}

struct Plan {
    const Unit* units;
    int64_t n;
    int64_t head, rows;  // rows of queries, padded, of one head and of all heads: the most that a unit has
};

// All work in pieces, which threads take one after another: who takes what is of no account for the result.
Plan make_plan(const Attend& a, int threads) {
    static thread_local Scratch<Unit> units_of;
    static thread_local Scratch<int64_t> loads_of;
    const int64_t R = a.H / a.G, queries = std::max(int64_t(1), MOST_ROWS / R);
    int64_t parts = 0, cost = 0, n = 0, head = 0, rows = 0;
    for (int64_t b = 0; b < a.B; b++) parts += (first_row(a, b + 1) - first_row(a, b) + queries - 1) / queries;
    Unit *units = units_of.get(parts * (a.G + 1)), *whole = units + parts * a.G, *end = whole;
    auto padded = [&](const Unit& u) { return ((u.t1 - u.t0) * R + 15) / 16 * 16; };
    for (int64_t b = 0; b < a.B; b++)
        for (int64_t t0 = 0, T = first_row(a, b + 1) - first_row(a, b); t0 < T; t0 += queries) {
            Unit u{b, t0, std::min(t0 + queries, T), 0, a.G, 0};
            const int64_t blocks = (a.start[b] + u.t1 + KEYS - 1) / KEYS - first_key(a, b, a.start[b] + t0) / KEYS;
            u.cost = blocks * (padded(u) + 32);  // laying a block out takes the time of some 32 rows
            cost += u.cost * a.G;
            *end++ = u;
        }
    std::stable_sort(whole, end, [](const Unit& u, const Unit& v) { return u.cost > v.cost; });
    // The costliest first, each to the thread that has least. A unit is of many heads, since what lies side by side is
    // read together, but of no more than fill that thread's share.
    int64_t *loads = loads_of.get(threads), fair = (cost + threads - 1) / threads;
    std::fill_n(loads, threads, 0);
    for (const Unit* u = whole; u < end; u++)
        for (int64_t g = 0; g < a.G;) {
            int64_t& least = *std::min_element(loads, loads + threads);
            const int64_t most = std::min(a.G - g, MOST_ROWS / padded(*u)), heads = std::max(int64_t(1), std::min(most, (fair - least) / u->cost));
            units[n++] = {u->b, u->t0, u->t1, g, g + heads, u->cost};
            least += heads * u->cost, g += heads;
            head = std::max(head, padded(*u)), rows = std::max(rows, heads * padded(*u));
        }
    return {units, n, head, rows};
}

void attend(const Attend& a, const Plan& plan, int threads) {
    const int64_t D32 = (a.D + 31) / 32 * 32;
    std::atomic<int64_t> taken{0};
    parallel(threads, [&](int, int) {
        static thread_local Scratch<float> room_of;
        // In floats: k, v and line are bfloat16 (or k, v float), q and p too.
        const int64_t block = KEYS * D32, sizes[] = {block, block, block, plan.rows * D32 / 2, plan.head * KEYS / 2, plan.head * KEYS, plan.rows * D32, plan.rows, plan.rows * 16, KEYS, KEYS};
        int64_t all_sizes = 0;
        for (int64_t size : sizes) all_sizes += (size + 15) / 16 * 16;
        float *at = room_of.get(all_sizes), *place[11];
        for (int i = 0; i < 11; i++) {
            place[i] = at;
            at += (sizes[i] + 15) / 16 * 16;
        }
        auto half = [&](int i) { return reinterpret_cast<uint16_t*>(place[i]); };
        const Room r{D32, half(0), half(1), half(3), half(4), half(2), place[0], place[1], place[5], place[6], place[7], place[8], place[9], place[10]};
        std::memset(r.line, 0, 2 * block * 2);  // the padding of D stays zero
#if defined(WITH_AMX)
        configure_tiles();
#endif
        for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < plan.n;) attend_rows(a, r, plan.units[i]);
#if defined(WITH_AMX)
        _tile_release();
#endif
    });
    if (a.keep) remember(a, threads);
}

// ---------------------------------------------------------------- a block of the model, but for its attention

// Everything of a transformer block on either side of attention, in two calls: between calls of its parts, one by
// one, the interpreter would take a tenth of a step of decoding, its own memory being cold after each weight.
struct Block {
    Weights wq, wk, wv, wo, w1, w2, w3;
    const void *attention_norm, *ffn_norm;
    int64_t dim, head_dim;
    float eps;
};

template <class T>
typename T::Store* room(int which, int64_t n) {
    static thread_local Scratch<typename T::Store> rooms[4];
    return rooms[which].get(n);
}

// q, k, v = rotated projections of the normed x (M, D).
template <class T>
void project(const Block& b, const void* x, int64_t M, const float* cos, const float* sin, int64_t angles, int threads, void* q, void* k, void* v) {
    using S = typename T::Store;
    S *h = room<T>(0, M * b.dim), *heads[] = {static_cast<S*>(q), static_cast<S*>(k)};
    rms_norm<T>(static_cast<const S*>(x), static_cast<const S*>(b.attention_norm), M, b.dim, b.eps, threads, h);
    linears<T>(h, M, b.dim, {&b.wq, &b.wk, &b.wv}, threads, {q, k, v});
    for (int i = 0; i < 2; i++)
        rotate<T>(heads[i], cos, sin, M, angles, (i ? b.wk : b.wq).N / b.head_dim, b.head_dim, threads, heads[i]);
}

// y = z + feed_forward(norm(z)), z = x + wo(attended).
template <class T>
void finish_block(const Block& b, const void* x, const void* attended, int64_t M, int threads, void* y) {
    using S = typename T::Store;
    S *h = room<T>(0, M * b.dim), *gate = room<T>(1, M * b.w1.N), *up = room<T>(2, M * b.w1.N), *z = room<T>(3, M * b.dim);
    linears<T>(attended, M, b.wq.N, {&b.wo}, threads, {h});
    add<T>(static_cast<const S*>(x), h, M * b.dim, threads, z);
    rms_norm<T>(z, static_cast<const S*>(b.ffn_norm), M, b.dim, b.eps, threads, h);
    linears<T>(h, M, b.dim, {&b.w1, &b.w3}, threads, {gate, up});
    silu_mul<T>(gate, up, M * b.w1.N, threads, gate);
    linears<T>(gate, M, b.w1.N, {&b.w2}, threads, {h});
    add<T>(z, h, M * b.dim, threads, static_cast<S*>(y));
}

// Keys or values (rows, D) of heads to int8, each with its own scale.
void quantise_heads(const uint16_t* x, int64_t rows, int64_t D, int threads, int8_t* q, float* scale) {
    parallel(rows * D < 1 << 16 ? 1 : threads, [&](int t, int n) {
        const Span mine = share(rows, t, n);
        int32_t sum;
        for (int64_t i = mine.begin; i < mine.end; i++) quantise_row<BF16>({1, D, D, D, D, q + i * D, scale + i, &sum}, 0, x + i * D);
    });
}

// All blocks of a model over a ring or pages: `a` says where these lie and how far they are filled, and keeps what is new.
void run_layers(const Block* blocks, int64_t n_layers, void* const* old, Attend a, uint16_t* x, const float* cos, const float* sin, int64_t angles, int threads) {
    static thread_local Scratch<uint16_t> qkv_of;
    static thread_local Scratch<int8_t> codes_of;
    static thread_local Scratch<float> scales_of;
    const int64_t M = a.N, nq = M * a.H * a.D, nk = M * a.G * a.D;
    uint16_t *q = qkv_of.get(2 * nq + 2 * nk), *k = q + nq, *v = k + nk, *out = v + nk;
    int8_t* codes = codes_of.get(a.int8 ? 2 * nk : 1);
    float* scales = scales_of.get(a.int8 ? 2 * M * a.G : 1);
    a.q = q, a.k = k, a.v = v, a.out = out, a.keep = true;
    const Plan plan = make_plan(a, threads);
    for (int64_t n = 0; n < n_layers; n++) {
        project<BF16>(blocks[n], x, M, cos, sin, angles, threads, q, k, v);
        a.old_k = *old++, a.old_v = *old++;
        if (a.int8) {
            a.old_ks = static_cast<float*>(*old++), a.old_vs = static_cast<float*>(*old++);
            quantise_heads(k, M * a.G, a.D, threads, codes, scales);
            quantise_heads(v, M * a.G, a.D, threads, codes + nk, scales + M * a.G);
            a.k = codes, a.v = codes + nk, a.ks = scales, a.vs = scales + M * a.G;
        }
        attend(a, plan, threads);
        finish_block<BF16>(blocks[n], x, out, M, threads, x);
    }
}

}  // namespace

extern "C" {

// y (M, N) = x (M, K) w8^T with w8 of int8 or int4 codes. bf16: x and y are bfloat16, else float32.
void m7b_linear(int bf16, const void* x, int64_t M, int64_t K, int bits, const uint8_t* codes, const uint8_t* groups,
                int64_t group, const float* scale, int64_t N, int64_t Kp, int threads, void* out) {
    const Weights w{N, Kp, bits == 4 ? group : Kp, codes, groups, scale, nullptr, bits};
    bf16 ? linears<BF16>(x, M, K, {&w}, threads, {out}) : linears<F32>(x, M, K, {&w}, threads, {out});
}

// y (M, N) = x (M, K) w^T with GGUF's blocks of 8 or 4 bits, K a multiple of 32; d: half floats [N/16][K/32][16].
void m7b_block_linear(int bf16, const void* x, int64_t M, int64_t K, int bits, const uint8_t* codes, const uint16_t* d,
                      int64_t N, int threads, void* out) {
    const Weights w{N, K, BLOCK, codes, nullptr, nullptr, d, bits};
    bf16 ? linears<BF16>(x, M, K, {&w}, threads, {out}) : linears<F32>(x, M, K, {&w}, threads, {out});
}

void m7b_project(const void* block, int bf16, const void* x, int64_t M, const float* cos, const float* sin, int64_t angles,
                 int threads, void* q, void* k, void* v) {
    const Block& b = *static_cast<const Block*>(block);
    bf16 ? project<BF16>(b, x, M, cos, sin, angles, threads, q, k, v) : project<F32>(b, x, M, cos, sin, angles, threads, q, k, v);
}

void m7b_finish_block(const void* block, int bf16, const void* x, const void* attended, int64_t M, int threads, void* y) {
    const Block& b = *static_cast<const Block*>(block);
    bf16 ? finish_block<BF16>(b, x, attended, M, threads, y) : finish_block<F32>(b, x, attended, M, threads, y);
}

void m7b_rms_norm(int bf16, const void* x, const void* weight, int64_t M, int64_t D, float eps, int threads, void* y) {
    bf16 ? rms_norm<BF16>((const uint16_t*)x, (const uint16_t*)weight, M, D, eps, threads, (uint16_t*)y)
         : rms_norm<F32>((const float*)x, (const float*)weight, M, D, eps, threads, (float*)y);
}

void m7b_silu_mul(int bf16, const void* gate, const void* up, int64_t n, int threads, void* y) {
    bf16 ? silu_mul<BF16>((const uint16_t*)gate, (const uint16_t*)up, n, threads, (uint16_t*)y)
         : silu_mul<F32>((const float*)gate, (const float*)up, n, threads, (float*)y);
}

// x (M, heads, D); cos and sin (angles, D / 2), repeated if M is a multiple of `angles`.
void m7b_rotate(int bf16, const void* x, const float* cos, const float* sin, int64_t M, int64_t angles, int64_t heads,
                int64_t D, int threads, void* y) {
    bf16 ? rotate<BF16>((const uint16_t*)x, cos, sin, M, angles, heads, D, threads, (uint16_t*)y)
         : rotate<F32>((const float*)x, cos, sin, M, angles, heads, D, threads, (float*)y);
}

void m7b_attend(const void* place, int int8, int64_t H, int64_t G, int64_t D, const void* q, const void* k, const void* v,
                const float* ks, const float* vs, void* old_k, void* old_v, float* old_ks, float* old_vs, int keep,
                int threads, void* out) {
    const Attend a{*static_cast<const Place*>(place), H, G, D, (const uint16_t*)q, k, v, ks, vs, old_k, old_v, old_ks, old_vs,
                   keep != 0, int8 != 0, (uint16_t*)out};
    attend(a, make_plan(a, threads), threads);
}

// x (N, D) bfloat16 through all blocks, in place. old: for each layer its keys and values, in int8 their scales too.
void m7b_layers(const void* blocks, int64_t n_layers, void* const* old, const void* place, int int8, int64_t H, int64_t G,
                int64_t D, const float* cos, const float* sin, int64_t angles, int threads, void* x) {
    Attend a{};
    static_cast<Place&>(a) = *static_cast<const Place*>(place);
    a.H = H, a.G = G, a.D = D, a.int8 = int8 != 0;
    run_layers(static_cast<const Block*>(blocks), n_layers, old, a, static_cast<uint16_t*>(x), cos, sin, angles, threads);
}

// How fast memory can be read, to be timed: the sum of a buffer's 64-bit words, without what is left of 128 bytes.
// Each thread reads two streams, a line of 64 bytes of each at a time, and asks for what comes 1024 bytes later.
int64_t m7b_read(const void* p, int64_t nbytes, int threads) {
    const std::unique_ptr<uint64_t[]> sums(new uint64_t[threads]());
    parallel(threads, [&](int t, int n) {
        const Span pairs = share(nbytes / 128, t, n);
        const int64_t lines = pairs.end - pairs.begin;
        const uint64_t* a = static_cast<const uint64_t*>(p) + pairs.begin * 16;
        const uint64_t* b = a + lines * 8;
        uint64_t sum[8] = {};
        for (int64_t i = 0; i < lines; i++, a += 8, b += 8) {
            __builtin_prefetch(a + 128);
            __builtin_prefetch(b + 128);
            for (int j = 0; j < 8; j++) sum[j] += a[j] + b[j];
        }
        for (int j = 0; j < 8; j++) sums[t] += sum[j];
    });
    uint64_t total = 0;
    for (int t = 0; t < threads; t++) total += sums[t];
    return static_cast<int64_t>(total);
}

// The instructions that run here; "" if the system does not grant them, and this library must not be used.
const char* m7b_path() {
#if defined(WITH_AMX)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0 ? "AMX" : "";
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return "AVX-512 VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "scalar";
#endif
}

}  // extern "C"
