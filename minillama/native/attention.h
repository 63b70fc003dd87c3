// Attention inputs and outputs by strides, and the distribution of key/value heads over threads.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <omp.h>

extern "C" {

// (B, H, T, E) or (B, K, T, E), with strides in elements; the last dimension is contiguous.
struct Tensor {
    void* first;
    int64_t batch, head, token;
};
}

namespace {

template <class T>
T* head_of(const Tensor& x, int b, int h) {
    return (T*)x.first + b * x.batch + h * x.head;
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Run `each(pass, b, k)` per key/value head of a batch, with one `Pass` per thread. Returns whether the workspace could
// be allocated, which happens before the threads start, since they cannot report a failure.
template <class Pass, class Sizes, class Each>
int32_t over_heads(int batch, int kv_heads, int threads, const Sizes& n, const Each& each) {
    std::unique_ptr<char, Free> memory((char*)std::aligned_alloc(64, threads * Pass::bytes(n)));
    if (!memory) return 0;
#pragma omp parallel num_threads(threads)
    {
        Pass pass(n, memory.get() + omp_get_thread_num() * Pass::bytes(n));
#pragma omp for schedule(dynamic)
        for (int i = 0; i < batch * kv_heads; i++) each(pass, i / kv_heads, i % kv_heads);
    }
    return 1;
}

}  // namespace
