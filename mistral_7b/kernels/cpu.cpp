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
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE_N = 16, LINE = 64, BLOCK = 32, PREFETCH = 1536;

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

template <class T>
void finish(const Rows& r, const Weights& w, int64_t row, int64_t tile, const int32_t* sums, void* out) {
    typename T::Store* y = static_cast<typename T::Store*>(out) + row * w.N + tile * TILE_N;
    const int64_t n = std::min(TILE_N, w.N - tile * TILE_N);
    const float sx = r.scale[row], *scale = w.scale + tile * TILE_N;
    for (int64_t i = 0; i < n; i++) T::put(y, i, float(sums[i]) * sx * scale[i]);
}

// R rows by one tile of 16 outputs, codes of 8 bits (128 is zero): the matrix-vector product of int8.
template <int R>
void dot_tile8(const Rows& r, int64_t row, const uint8_t* codes, Sums* out) {
    constexpr int U = R == 1 ? 4 : 1;  // chains of sums: an instruction takes five cycles
    Sums s[R][U];
    for (auto& chain : s)
        for (auto& v : chain) v = zero();
    const int8_t* x = r.q + row * r.Kp;
    for (int64_t k = 0; k < r.Kp; k += 4 * U) {
        for (int u = 0; u < U; u++) {
            __builtin_prefetch(codes + PREFETCH);
            const Line line = load(codes);
            codes += LINE;
            for (int i = 0; i < R; i++) s[i][u] = dot8(s[i][u], line, x + i * r.Kp + k + 4 * u);
        }
    }
    for (int i = 0; i < R; i++) {
        out[i] = s[i][0];
        for (int u = 1; u < U; u++) out[i] = add(out[i], s[i][u]);
    }
}

template <int R>
void dot_tile4(const Rows& r, int64_t row, const uint8_t* codes, const uint8_t* groups, Sums* out) {
    for (int i = 0; i < R; i++) out[i] = zero();
    const int8_t* x = r.q + row * r.Kp;
    const int64_t G = r.Kp / r.group;
    for (int64_t g = 0; g < G; g++) {
        Sums a[R], b[R];
        for (int i = 0; i < R; i++) a[i] = b[i] = zero();
        for (int64_t k = 0; k < r.group; k += 8) {
            __builtin_prefetch(codes + PREFETCH);
            const Line line = load(codes), lo = low(line), hi = high(line);
            codes += LINE;
            for (int i = 0; i < R; i++) {
                a[i] = dot4(a[i], lo, x + i * r.Kp + k);
                b[i] = dot4(b[i], hi, x + i * r.Kp + k + 4);
            }
        }
        for (int i = 0; i < R; i++)
            out[i] = fold(out[i], add(a[i], b[i]), groups, r.sum[(row + i) * G + g]);
        groups += TILE_N;
        x += r.group;
    }
}

// The codes of one tile from int4 to int8, inputs begin..end.
void widen_tile(const Weights& w, int64_t tile, int64_t begin, int64_t end, uint8_t* out) {
    const uint8_t* codes = w.codes + tile * w.Kp * 8 + begin / 8 * LINE;
    const uint8_t* groups = w.groups + tile * (w.Kp / w.group) * TILE_N;
    for (int64_t k = begin; k < end;) {
        const Widening widen(groups + k / w.group * TILE_N);
        for (const int64_t stop = std::min(end, (k / w.group + 1) * w.group); k < stop; k += 8) {
            const Line line = load(codes);
            widen.put(out, low(line));
            widen.put(out + LINE, high(line));
            codes += LINE;
            out += 2 * LINE;
        }
    }
}

constexpr int64_t FEW = 4;  // rows up to which weights are used as they lie, and beyond which int4 is widened first

template <class T, int R>
void few_rows(const Rows& r, const Weights& w, int64_t row, int64_t tile, const uint8_t* wide, void* out) {
    Sums s[R];
    int32_t v[16];
    if (wide || w.bits == 8)
        dot_tile8<R>(r, row, wide ? wide : w.codes + tile * w.Kp * TILE_N, s);
    else
        dot_tile4<R>(r, row, w.codes + tile * w.Kp * 8, w.groups + tile * (w.Kp / w.group) * TILE_N, s);
    for (int i = 0; i < R; i++) {
        store(v, s[i]);
        if (wide || w.bits == 8) {
            int32_t sum = 0;
            for (int64_t g = 0; g < r.Kp / r.group; g++) sum += r.sum[(row + i) * (r.Kp / r.group) + g];
            for (auto& n : v) n -= 128 * sum;
        }
        finish<T>(r, w, row + i, tile, v, out);
    }
}

template <class T>
void any_rows(const Rows& r, const Weights& w, int64_t tile, const uint8_t* wide, void* out) {
    int64_t row = 0;
    for (; row + FEW <= r.M; row += FEW) few_rows<T, FEW>(r, w, row, tile, wide, out);
    switch (r.M - row) {
        case 3: few_rows<T, 3>(r, w, row, tile, wide, out); break;
        case 2: few_rows<T, 2>(r, w, row, tile, wide, out); break;
        case 1: few_rows<T, 1>(r, w, row, tile, wide, out); break;
        default: break;
    }
}

// ---------------------------------------------------------------- AMX: tiles of 16 rows by 16 outputs by 64 inputs

#if defined(__AMX_INT8__)

constexpr int64_t NB = 16, KB = 1024, MB = 512;  // a block: 256 outputs (256 KB of codes in L2), 1024 inputs, 512 rows

bool amx_allowed() {
    static const bool yes = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return yes;
}

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

// C (32 rows, 32 outputs) += A B over `steps` tiles of inputs; first: C begins at zero.
void block_2x2(const int8_t* a, int64_t lda, const uint8_t* b, int64_t ldb, int64_t steps, int32_t* c, int64_t ldc, bool first) {
    fence();
    int32_t* below = c + 16 * ldc;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + 16, ldc * 4);
        _tile_loadd(2, below, ldc * 4);
        _tile_loadd(3, below + 16, ldc * 4);
    }
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(4, a + i * 64, lda);
        _tile_loadd(6, b + i * 1024, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b + ldb + i * 1024, 64);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, a + 16 * lda + i * 64, lda);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, below, ldc * 4);
    _tile_stored(3, below + 16, ldc * 4);
    fence();
}

// C (16 rows, 16 times `count` outputs) likewise, count up to 4: for the last rows, or no more than 16.
void block_1x4(const int8_t* a, int64_t lda, const uint8_t* b, int64_t ldb, int64_t steps, int32_t* c, int64_t ldc, bool first, int64_t count) {
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
    _tile_stored(0, c, ldc * 4);
    if (count > 1) _tile_stored(1, c + 16, ldc * 4);
    if (count > 2) _tile_stored(2, c + 32, ldc * 4);
    if (count > 3) _tile_stored(3, c + 48, ldc * 4);
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
            if (padded - m >= 32 && width % 2 == 0) {
                for (int64_t t = 0; t < width; t += 2)
                    block_2x2(a, r.Kp, b + t * ldb, ldb, steps, c + m * ldc + t * 16, ldc, k == 0);
                m += 32;
            } else {
                for (int64_t t = 0; t < width; t += 4)
                    block_1x4(a, r.Kp, b + t * ldb, ldb, steps, c + m * ldc + t * 16, ldc, k == 0, width - t);
                m += 16;
            }
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

template <class T>
void amx_linear(const Rows& r, const Weights& w, int threads, void* out) {
    const int64_t tiles = (w.N + 15) / 16;
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

template <class T>
void linear(const void* x, int64_t M, int64_t K, const Weights& w, int threads, void* out) {
    static thread_local Scratch<int8_t> codes_of;
    static thread_local Scratch<float> scale_of;
    static thread_local Scratch<int32_t> sum_of;
    const int64_t padded = (M + 15) / 16 * 16, G = w.Kp / w.group;
    Rows r{M, K, w.Kp, w.Kp, w.group, codes_of.get(padded * w.Kp), scale_of.get(M), sum_of.get(M * G)};
    if (M * w.N * w.Kp < 1 << 18) threads = 1;  // waking another thread would take longer
    const auto* rows = static_cast<const typename T::Store*>(x);
    parallel(M < 4 ? 1 : threads, [&](int t, int n) {
        const Span mine = share(M, t, n);
        for (int64_t m = mine.begin; m < mine.end; m++) quantise_row<T>(r, m, rows + m * K);
    });
#if defined(__AMX_INT8__)
    if (M > FEW && amx_allowed()) {
        std::memset(r.q + M * w.Kp, 0, (padded - M) * w.Kp);
        amx_linear<T>(r, w, threads, out);
        return;
    }
#endif
    const int64_t tiles = (w.N + 15) / 16;
    parallel(threads, [&](int t, int n) {
        static thread_local Scratch<uint8_t> wide_of;
        const Span mine = share(tiles, t, n);
        uint8_t* wide = w.bits == 4 && M > FEW ? wide_of.get(w.Kp * TILE_N + 2048) : nullptr;
        for (int64_t tile = mine.begin; tile < mine.end; tile++) {
            if (wide) widen_tile(w, tile, 0, w.Kp, wide);
            any_rows<T>(r, w, tile, wide, out);
        }
    });
}

}  // namespace

extern "C" {

// y (M, N) = x (M, K) w8^T with w8 of int8 or int4 codes. bf16: x and y are bfloat16, else float32.
void m7b_linear(int bf16, const void* x, int64_t M, int64_t K, int bits, const uint8_t* codes, const uint8_t* groups,
                int64_t group, const float* scale, int64_t N, int64_t Kp, int threads, void* out) {
    const Weights w{N, Kp, bits == 4 ? group : Kp, codes, groups, scale, nullptr, bits};
    bf16 ? linear<BF16>(x, M, K, w, threads, out) : linear<F32>(x, M, K, w, threads, out);
}

const char* m7b_path() {
#if defined(__AMX_INT8__)
    return amx_allowed() ? "AMX" : "AVX-512 VNNI (AMX not granted)";
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return "AVX-512 VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "scalar";
#endif
}

}  // extern "C"
