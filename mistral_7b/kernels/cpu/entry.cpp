// The C interface of the CPU kernels, which are a single translation unit.
//
// Plain C++17; the widest instruction set that the compiler flags enable is used. The headers in reading order, in
// which each includes only those before it:
//
//   vectors.h        bfloat16 and float16 conversions, vectors of 16 floats
//   threads.h        scratch memory and parallel loops
//   formats.h        the formats of weights: GGUF's blocks, in tiles of 16 outputs
//   weights.h        weights, activations quantized for them, and the definition of their product
//   lines.h          dot products of a 64-byte line of weights, per instruction set
//   blocks.h         products of rows with weights in blocks
//   amx.h            the matrix unit
//   tiles.h          products of many rows on it
//   tile_check.h     a check of them when the library is loaded
//   dequantize.h     weights in rows of floats
//   low_rank.h       LoRA updates of products, with an adapter per row
//   products.h       products of one x with several weights of any format
//   elementwise.h    RMSNorm, SwiGLU's gate, addition and rotary embedding
//   keys.h           where keys and values are stored: new ones, a ring, pages
//   scores.h         attention of one head's rows over one block of keys
//   float_attention.h   attention of float32 rows
//   attention.h      attention over all blocks, rows and threads
//   layers.h         a transformer block without its attention, and all blocks of a model
//   rounding.h       rounding of weights to block formats, with error feedback

#include <cstdint>
#include <memory>

#include "dequantize.h"
#include "layers.h"
#include "rounding.h"
#include "tile_check.h"

#if defined(WITH_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" {

// Each function takes one structure, defined in its header and mirrored in arguments.py. bf16: bfloat16, else float32.

void m7b_linear(const LinearCall* c) {
    c->bf16 ? linears<BF16>(c->x, c->M, c->K, {c->weight}, c->threads, {c->out}) : linears<F32>(c->x, c->M, c->K, {c->weight}, c->threads, {c->out});
}

void m7b_dequantize(const DequantizeCall* c) { c->bf16 ? dequantize<BF16>(*c) : dequantize<F32>(*c); }

void m7b_low_rank(const LowRankCall* c) {
    const Weights w{c->N, c->K, nullptr, nullptr, 0, c->adapters, c->mixture};
    c->bf16 ? add_low_rank<BF16>(c->x, c->M, c->K, {&w}, c->threads, {c->y}) : add_low_rank<F32>(c->x, c->M, c->K, {&w}, c->threads, {c->y});
}

void m7b_rms_norm(const RMSNormCall* c) { c->bf16 ? rms_norm<BF16>(*c) : rms_norm<F32>(*c); }

void m7b_rms_norm_back(const RMSNormBackCall* c) { c->bf16 ? rms_norm_back<BF16>(*c) : rms_norm_back<F32>(*c); }

void m7b_silu_mul(const SiluMulCall* c) { c->bf16 ? silu_mul<BF16>(*c) : silu_mul<F32>(*c); }

void m7b_silu_mul_back(const SiluMulBackCall* c) { c->bf16 ? silu_mul_back<BF16>(*c) : silu_mul_back<F32>(*c); }

void m7b_rotate(const RotateCall* c) { c->bf16 ? rotate<BF16>(*c) : rotate<F32>(*c); }

void m7b_project(const ProjectCall* c) { c->bf16 ? project<BF16>(*c) : project<F32>(*c); }

void m7b_finish_block(const FinishBlockCall* c) { c->bf16 ? finish_block<BF16>(*c) : finish_block<F32>(*c); }

void m7b_attend(const Attend* a) { attend(*a, make_plan(*a)); }

void m7b_layers(const LayersCall* c) { run_layers(*c); }

void m7b_round(const RoundCall* c) {
    if (c->q6)
        c->bf16 ? round_searched<BF16, 16>(*c) : round_searched<F32, 16>(*c);
    else
        c->bf16 ? round_searched<BF16, 32>(*c) : round_searched<F32, 32>(*c);
}

void m7b_feedback(const FeedbackCall* c) { feedback(*c); }

// For measuring memory bandwidth: the sum of a buffer's 64-bit words, without a remainder below 128 bytes.
// Each thread reads two streams, 64 bytes of each at a time, and prefetches 1024 bytes ahead.
int64_t m7b_read(const void* p, int64_t nbytes, int threads) {
    const std::unique_ptr<uint64_t[]> sums(new uint64_t[threads]());
    parallel(threads, [&](int t, int n) {
        const Span pairs = partition(nbytes / 128, t, n);
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

// The instruction set in use; "" if the system does not permit it, and the library must not be used.
const char* m7b_instructions() {
#if defined(WITH_AMX)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0 ? "AMX" : "";
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return "AVX-512 VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return "NEON i8mm";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "NEON dotprod";
#else
    return "scalar";
#endif
}

// Whether the products of the matrix unit, if it is used, are right; after m7b_instructions, which asks for its use.
int m7b_check() { return check_tiles(); }

}  // extern "C"
