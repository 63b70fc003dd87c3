// SIMD vectors of 16 lanes, by compiler extensions and AVX-512 intrinsics: bfloat16 conversion, exponentials.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int WIDTH = 16;  // floats per vector; the compiler splits it where the processor's are narrower
typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
typedef uint8_t Nibbles __attribute__((vector_size(WIDTH)));

template <class T>
inline T load(const void* from) {
    T vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class T>
inline void store(void* to, T vector) {
    std::memcpy(to, &vector, sizeof vector);
}

inline float sum(Vector v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return v[0] + v[1];
}

inline float bf16_to_f32(uint16_t bits) {  // bfloat16 is the upper half of a float32
    uint32_t whole = uint32_t(bits) << 16;
    return load<float>(&whole);
}

inline uint16_t f32_to_bf16(float value) {  // to the nearest bfloat16, ties to even
    uint32_t bits = load<uint32_t>(&value);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __AVX512F__  // one instruction each, which GCC does not select by itself
inline Ints whole(Halves x) { return (Ints)_mm512_cvtepu16_epi32((__m256i)x); }
inline Ints whole(Bytes x) { return (Ints)_mm512_cvtepi8_epi32((__m128i)x); }
inline Ints whole(Nibbles x) { return (Ints)_mm512_cvtepu8_epi32((__m128i)x); }
#else
inline Ints whole(Halves x) { return __builtin_convertvector(x, Ints); }
template <class T>  // via 16 bits: GCC scalarizes the direct conversion
inline Ints whole(T x) { return __builtin_convertvector(__builtin_convertvector(x, Shorts), Ints); }
#endif

inline Vector bf16_to_f32(Halves x) { return (Vector)(whole(x) << 16); }

// e^x with relative error 2e-7: 2^n (1 + r + r^2 / 2 + ... + r^6 / 720), n = round(x / ln 2). Clamped to the range of
// float32.
inline Vector exp(Vector x) {
    const Vector top = Vector{} + 88, bottom = Vector{} - 87;
    x = x > top ? top : x;
    x = x < bottom ? bottom : x;
    // with the exponent's bias n is never negative, so that truncation rounds down
    Ints n = __builtin_convertvector(x * 1.44269504f + 127.5f, Ints);
    Vector r = x - __builtin_convertvector(n - 127, Vector) * 0.69314718f;
    Vector series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return series * (Vector)(n << 23);
}

#ifdef __AVX512BF16__  // the same for AVX-512 types
typedef uint16_t Half;  // bfloat16 is the upper half of a float32

inline __m512 bf16_to_f32(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m256i f32_to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// 2^x with relative error 3e-6, 0 below 2^-126: minimax polynomial on [-1/2, 1/2]; the integer part, which adding
// 3 * 2^22 leaves in the lowest bits, goes into the exponent.
inline __m512 fast_exp2(__m512 x) {
    const __m512 shift = _mm512_set1_ps(12582912);
    __m512 whole = _mm512_add_ps(x, shift), f = _mm512_sub_ps(x, _mm512_sub_ps(whole, shift));
    __m512 y = _mm512_set1_ps(9.570100592e-3f);
    for (float c : {5.591786022e-2f, 2.402474486e-1f, 6.931218148e-1f, 9.999992614e-1f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    __mmask16 in_range = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);  // and NaN
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(in_range, _mm512_castps_si512(y), exponent));
}
#endif

}  // namespace
