// Scratch memory and parallel loops.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

struct FreeDeleter {
    void operator()(void* p) const { std::free(p); }
};

// Scratch memory that is reused between calls, so that a decode step allocates nothing.
template <class T>
struct Scratch {
    std::unique_ptr<void, FreeDeleter> memory;
    size_t size = 0;
    T* get(size_t n) {
        if (n * sizeof(T) > size) {
            size = (n * sizeof(T) + 4095) / 4096 * 4096;
            memory.reset();
            memory.reset(std::aligned_alloc(4096, size));
            if (!memory) {
                size = 0;
                throw std::bad_alloc();
            }
        }
        return static_cast<T*>(memory.get());
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
// The part of 0..n of thread t.
Span partition(int64_t n, int t, int threads) { return {n * t / threads, n * (t + 1) / threads}; }

}  // namespace
