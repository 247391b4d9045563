// Scratch memory and threads.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

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

}  // namespace
