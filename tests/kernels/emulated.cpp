// Calls the kernels of a shared library on memory images; emulated.py runs it for another CPU, in an emulator.
//
//   program LIBRARY FUNCTION...
//
// Writes the name of the instruction set and a newline, then answers requests on stdin:
//
//   in     int64 function, root, size, n; int64 pointers[n]; image, `size` bytes
//   out    the image after the call
//
// `function` is an index of the command line's FUNCTIONs, `root` the offset of its argument in the image, and
// `pointers` are the offsets of pointers. The pointers in an image are offsets in it.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Request {
    int64_t function, root, size, n;
};

template <class T>
bool read(T* to, size_t n) {
    return std::fread(to, sizeof(T), n, stdin) == n;
}

int main(int argc, char** argv) {
    void* library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    std::puts(reinterpret_cast<const char* (*)()>(dlsym(library, "m7b_instructions"))());
    std::fflush(stdout);
    for (Request r; read(&r, 1);) {
        std::vector<int64_t> pointers(r.n);
        char* image = static_cast<char*>(std::aligned_alloc(64, r.size));
        if (!image || !read(pointers.data(), r.n) || !read(image, r.size)) return 2;
        auto pointer = [&](int64_t at) { return reinterpret_cast<int64_t*>(image + at); };
        for (int64_t at : pointers) *pointer(at) += reinterpret_cast<int64_t>(image);
        reinterpret_cast<void (*)(const void*)>(dlsym(library, argv[2 + r.function]))(image + r.root);
        for (int64_t at : pointers) *pointer(at) -= reinterpret_cast<int64_t>(image);
        std::fwrite(image, 1, r.size, stdout);
        std::fflush(stdout);
        std::free(image);
    }
}
