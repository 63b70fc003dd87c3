// Softmax gradient of the cross-entropy loss in bfloat16. Compiled by build.py, called by softmax.py.

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace {

constexpr int LANES = 16;

// Calls `each(at, mask)` per 16 values of a row; the mask selects the valid lanes.
template <class Each>
inline void across(int64_t width, const Each& each) {
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES) each(at, __mmask16(0xffff));
    if (at < width) each(at, __mmask16((1 << (width - at)) - 1));
}

inline __m512 load(const Half* from, __mmask16 mask) {  // -infinity in masked lanes
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, bf16_to_f32(_mm256_maskz_loadu_epi16(mask, from)));
}

inline __m512 fast_exp(__m512 x) { return fast_exp2(_mm512_mul_ps(x, _mm512_set1_ps(float(M_LOG2E)))); }

inline void store(Half* to, __mmask16 mask, __m512 x) { _mm256_mask_storeu_epi16(to, mask, f32_to_bf16(x)); }

}  // namespace

extern "C" {

// Softmax gradient Z (softmax(logits) - onehot(target)) of logits (rows, V), in place, with the normalizer
// Z = sum exp(logits - max) per row, and the losses log sum exp(logits) - logits[target].
void minillama_softmax_grad(int64_t rows, int64_t width, int32_t threads, Half* logits, const int64_t* targets,
                              float* losses, float* sums) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        Half* x = logits + row * width;
        __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        across(width, [&](int64_t at, __mmask16 mask) { highest = _mm512_max_ps(highest, load(x + at, mask)); });
        const float peak = _mm512_reduce_max_ps(highest), chosen = load(x + targets[row], 1)[0];
        across(width, [&](int64_t at, __mmask16 mask) {
            __m512 exponential = fast_exp(_mm512_sub_ps(load(x + at, mask), _mm512_set1_ps(peak)));
            sum = _mm512_add_ps(sum, exponential);
            store(x + at, mask, exponential);
        });
        const float z = _mm512_reduce_add_ps(sum);
        store(x + targets[row], 1, _mm512_sub_ps(fast_exp(_mm512_set1_ps(chosen - peak)), _mm512_set1_ps(z)));
        losses[row] = peak - chosen + std::log(z);
        sums[row] = z;
    }
}
}
