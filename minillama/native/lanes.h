// Sixteen numbers of AVX-512 with bfloat16.

#pragma once

#include <cstdint>
#include <immintrin.h>
#include <initializer_list>

namespace {

typedef uint16_t Half;  // bfloat16 is the upper half of a float32

inline __m512 widened(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m256i shortened(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// 2^x within 3e-6 of it, 0 below 2^-126: on [-1/2, 1/2] the polynomial of least relative error; the whole part, which
// adding 3 * 2^22 leaves in the lowest bits, goes into the exponent.
inline __m512 power_of_two(__m512 x) {
    const __m512 shift = _mm512_set1_ps(12582912);
    __m512 whole = _mm512_add_ps(x, shift), f = _mm512_sub_ps(x, _mm512_sub_ps(whole, shift));
    __m512 y = _mm512_set1_ps(9.570100592e-3f);
    for (float c : {5.591786022e-2f, 2.402474486e-1f, 6.931218148e-1f, 9.999992614e-1f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);  // and NaN
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(seen, _mm512_castps_si512(y), exponent));
}

}  // namespace
