// The softmax of the loss in bfloat16. Compiled by building.py, called by loss.py.

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace {

constexpr int LANES = 16;

// Calls `each(at, mask)` for every 16 numbers of a row; the mask says which of them are there.
template <class Each>
inline void across(int64_t width, const Each& each) {
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES) each(at, __mmask16(0xffff));
    if (at < width) each(at, __mmask16((1 << (width - at)) - 1));
}

inline __m512 load(const Half* from, __mmask16 mask) {  // -infinity where nothing is
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, bf16_to_f32(_mm256_maskz_loadu_epi16(mask, from)));
}

inline __m512 fast_exp(__m512 x) { return fast_exp2(_mm512_mul_ps(x, _mm512_set1_ps(float(M_LOG2E)))); }

inline void store(Half* to, __mmask16 mask, __m512 x) { _mm256_mask_storeu_epi16(to, mask, f32_to_bf16(x)); }

}  // namespace

extern "C" {

// Turn logits (rows, V) into Z (softmax(logits) - onehot(target)) in place, Z = sum exp(logits - their maximum) of a row,
// and write the losses log sum exp(logits) - logits[target].
void minillama_softmax_grad(int64_t rows, int64_t width, int32_t threads, Half* logits, const int64_t* targets,
                              float* losses, float* sums) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        Half* x = logits + row * width;
        __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        across(width, [&](int64_t at, __mmask16 mask) { highest = _mm512_max_ps(highest, load(x + at, mask)); });
        const float peak = _mm512_reduce_max_ps(highest), chosen = load(x + targets[row], 1)[0];
        across(width, [&](int64_t at, __mmask16 mask) {
            __m512 power = fast_exp(_mm512_sub_ps(load(x + at, mask), _mm512_set1_ps(peak)));
            sum = _mm512_add_ps(sum, power);
            store(x + at, mask, power);
        });
        const float z = _mm512_reduce_add_ps(sum);
        store(x + targets[row], 1, _mm512_sub_ps(fast_exp(_mm512_set1_ps(chosen - peak)), _mm512_set1_ps(z)));
        losses[row] = peak - chosen + std::log(z);
        sums[row] = z;
    }
}
}
