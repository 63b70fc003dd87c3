// SIMD vectors as wide as the processor's, by compiler extensions and intrinsics: bfloat16 conversion, exponentials,
// integer products.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined __AVX512F__ || defined __AVX2__
#include <immintrin.h>
#endif

// Inlined before the compiler decides what stays in registers.
#define LAMBDA __attribute__((always_inline))
#define INLINE inline LAMBDA

namespace {

// Floats per vector, and vectors that the registers hold beside the operands of a product: AVX-512 has 32 registers of
// 16 floats, AVX2 16 of 8, NEON 32 of 4.
#if defined __AVX512F__
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined __AVX2__
constexpr int WIDTH = 8, REGISTERS = 16;
#else
constexpr int WIDTH = 4, REGISTERS = 32;
#endif

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(4 * WIDTH)));  // twice as many as floats
typedef int8_t Bytes __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t Nibbles __attribute__((vector_size(16)));  // of 32 numbers
typedef int16_t Pairs __attribute__((vector_size(32)));

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

template <int N>
struct Floats {
    typedef float type __attribute__((vector_size(4 * N)));
};

typedef Floats<4>::type Four;

template <int N = WIDTH>
inline Four fold(typename Floats<N>::type v) {  // sums of every fourth number
    if constexpr (N == 4) return v;
    else {
        typename Floats<N / 2>::type halves[2];
        std::memcpy(halves, &v, sizeof v);
        return fold<N / 2>(halves[0] + halves[1]);
    }
}

inline float sum(Vector v) {
    Four four = fold(v);
    four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
    return four[0] + four[1];
}

inline Four sums(const Vector* v) {  // of four vectors
    Four a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
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

// One instruction each, which GCC does not select by itself.
#if defined __AVX512F__ || defined __AVX2__
inline Pairs whole(Nibbles x) { return (Pairs)_mm256_cvtepu8_epi16((__m128i)x); }
#else
inline Pairs whole(Nibbles x) { return __builtin_convertvector(x, Pairs); }
#endif

// A vector in a register: GCC would rather load it again for every use, and there are not so many loads per cycle.
template <class T>
INLINE void keep(T& vector) {
#if defined __AVX512BW__ || (defined __AVX2__ && !defined __AVX512F__)
    asm("" : "+v"(vector));
#else
    (void)vector;
#endif
}

// GCC would reorder additions of integers, and run out of registers.
INLINE Ints added(Ints sums, Ints products) {
    sums += products;
    keep(sums);
    return sums;
}

// Two halves of 32 numbers.
inline void join(Pairs low, Pairs high, Shorts* to) {
#ifdef __AVX512F__  // by way of memory the processor would wait for both
    *to = (Shorts)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
#else
    std::memcpy(to, &low, sizeof low);
    std::memcpy(to + sizeof low / sizeof *to, &high, sizeof high);
#endif
}
#if defined __AVX512F__
inline Ints whole(Halves x) { return (Ints)_mm512_cvtepu16_epi32((__m256i)x); }
inline Shorts whole(Bytes x) { return (Shorts)_mm512_cvtepi8_epi16((__m256i)x); }
inline Shorts scaled(Shorts x, Shorts y) { return (Shorts)_mm512_mulhrs_epi16((__m512i)x, (__m512i)y); }
#ifdef __AVX512VNNI__
INLINE Ints dot(Ints sums, Shorts x, Shorts y) { return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, (__m512i)y); }
#else
INLINE Ints dot(Ints sums, Shorts x, Shorts y) { return added(sums, (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)y)); }
#endif
#elif defined __AVX2__
inline Ints whole(Halves x) { return (Ints)_mm256_cvtepu16_epi32((__m128i)x); }
inline Shorts whole(Bytes x) { return (Shorts)_mm256_cvtepi8_epi16((__m128i)x); }
inline Shorts scaled(Shorts x, Shorts y) { return (Shorts)_mm256_mulhrs_epi16((__m256i)x, (__m256i)y); }
INLINE Ints dot(Ints sums, Shorts x, Shorts y) { return added(sums, (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)y)); }
#else
inline Ints whole(Halves x) { return __builtin_convertvector(x, Ints); }
inline Shorts whole(Bytes x) { return __builtin_convertvector(x, Shorts); }
typedef int16_t HalfShorts __attribute__((vector_size(2 * WIDTH)));
struct Wide {  // 32-bit products of 16-bit numbers
    Ints low, high;
    Wide(Shorts x, Shorts y) {
        HalfShorts a[2], b[2];
        std::memcpy(a, &x, sizeof x), std::memcpy(b, &y, sizeof y);
        low = __builtin_convertvector(a[0], Ints) * __builtin_convertvector(b[0], Ints);
        high = __builtin_convertvector(a[1], Ints) * __builtin_convertvector(b[1], Ints);
    }
};
inline Shorts scaled(Shorts x, Shorts y) {
    Wide product(x, y);
    HalfShorts halves[2] = {__builtin_convertvector((product.low + 0x4000) >> 15, HalfShorts),
                            __builtin_convertvector((product.high + 0x4000) >> 15, HalfShorts)};
    return load<Shorts>(halves);
}
INLINE Ints dot(Ints sums, Shorts x, Shorts y) {
    Wide product(x, y);
    return sums + product.low + product.high;
}
#endif
// scaled: x y / 2^15, rounded to nearest. dot: each sum plus two products, of neighbors where the processor adds those.

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

// 2^x with relative error 2e-7, 0 below 2^-126: minimax polynomial on [-1/2, 1/2]; the integer part, which adding
// 3 * 2^22 leaves in the lowest bits, goes into the exponent.
inline Vector exp2(Vector x) {
    const Vector shift = Vector{} + 12582912, zero = {};
    Vector whole = x + shift, f = x - (whole - shift), y = Vector{} + 1.327647245e-3f;
    for (float c : {9.675541893e-3f, 5.550713092e-2f, 2.402212024e-1f, 6.931469440e-1f, 1.000000119f}) y = y * f + c;
    return x < -126 ? zero : (Vector)((Ints)y + ((Ints)whole << 23));
}

#ifdef __AVX512BF16__  // the same for AVX-512 types
typedef uint16_t Half;  // bfloat16 is the upper half of a float32

inline __m512 bf16_to_f32(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m256i f32_to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// 2^x with relative error 3e-6, by the same method.
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
