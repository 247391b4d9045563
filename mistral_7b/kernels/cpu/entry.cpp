// What PyTorch has no fast operator for on a CPU: the C interface, last of all, and what it is made of.
//
// Plain C++17, in which the widest instructions that the flags allow are taken. All is one translation unit, of which
// this file is the end. In the order in which it is best read, and in which each includes those before it:
//
//   vectors.h        numbers of two and four bytes, sixteen floats at once
//   threads.h        scratch memory, and work shared out
//   weights.h        how weights and activations are laid out, and what a product of them is
//   lines.h          64 bytes of weights by four inputs, in the instructions that there are
//   few_rows.h       products with weights as they lie: decoding
//   tiles.h          products of many rows, on AMX
//   gguf_blocks.h    products with GGUF's blocks
//   low_rank.h       what adapters add to a product, each to its own rows
//   products.h       one x by several weights, of any form
//   elementwise.h    norm, gate, sum and rotation
//   keys.h           where keys and values lie: among the new ones, in a ring, in pages
//   scores.h         one block of them against the rows of one head
//   attention.h      all blocks, all rows, all threads
//   layers.h         a transformer block but for its attention, and all blocks of a model

#include <cstdint>
#include <memory>

#include "layers.h"

#if defined(WITH_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" {

// y (M, N) = x (M, K) w8^T with w8 of int8 or int4 codes. bf16: x and y are bfloat16, else float32.
void m7b_linear(int bf16, const void* x, int64_t M, int64_t K, int bits, const uint8_t* codes, const uint8_t* groups,
                int64_t group, const float* scale, int64_t N, int64_t Kp, int threads, void* out) {
    const Weights w{N, Kp, bits == 4 ? group : Kp, codes, groups, scale, nullptr, bits, nullptr, nullptr};
    bf16 ? linears<BF16>(x, M, K, {&w}, threads, {out}) : linears<F32>(x, M, K, {&w}, threads, {out});
}

// y (M, N) = x (M, K) w^T with GGUF's blocks of 8 or 4 bits, K a multiple of 32; d: half floats [N/16][K/32][16].
void m7b_block_linear(int bf16, const void* x, int64_t M, int64_t K, int bits, const uint8_t* codes, const uint16_t* d,
                      int64_t N, int threads, void* out) {
    const Weights w{N, K, BLOCK, codes, nullptr, nullptr, d, bits, nullptr, nullptr};
    bf16 ? linears<BF16>(x, M, K, {&w}, threads, {out}) : linears<F32>(x, M, K, {&w}, threads, {out});
}

// y (M, N) += what adapters make of x (M, K).
void m7b_add_low_rank(int bf16, const void* x, int64_t M, int64_t K, int64_t N, const void* adapters, void* mixture,
                      int threads, void* y) {
    const Weights w{N, K, K, nullptr, nullptr, nullptr, nullptr, 0, static_cast<const LowRank*>(adapters), static_cast<Mixture*>(mixture)};
    bf16 ? add_low_rank<BF16>(x, M, K, {&w}, threads, {y}) : add_low_rank<F32>(x, M, K, {&w}, threads, {y});
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
