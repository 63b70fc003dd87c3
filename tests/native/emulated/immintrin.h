// The AVX-512 and AMX intrinsics that the package's C++ uses, one lane after the other, for processors without them.
//
// The compiler finds this file in the place of its own <immintrin.h> (`-I`), so that the same sources run anywhere.
// With -D__AMX_BF16__ they take their tiles from here too. Semantics: Intel 64 and IA-32 Architectures Software
// Developer's Manual, volume 2, and the instruction set extensions reference.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef long long __m128i __attribute__((vector_size(16), may_alias));
typedef uint16_t __m512bh __attribute__((vector_size(64), may_alias));
typedef uint16_t __m256bh __attribute__((vector_size(32), may_alias));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

enum { _CMP_NLT_UQ = 0x15 };

namespace emulated {

typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef uint16_t Words16 __attribute__((vector_size(32), may_alias));
typedef int16_t Shorts __attribute__((vector_size(64), may_alias));
typedef int8_t Bytes __attribute__((vector_size(32), may_alias));
typedef uint8_t Bytes16 __attribute__((vector_size(16), may_alias));

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float from_bf16(uint16_t half) { return bits<float>(uint32_t(half) << 16); }

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

inline uint16_t to_bf16(float x) {  // to nearest, ties to even; denormals are zero, NaN is quiet
    uint32_t word = bits<uint32_t>(flushed(x));
    if (x != x) return uint16_t(word >> 16 | 0x40);
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

template <class F>
inline __m512 lanes(F f) {
    __m512 to;
    for (int i = 0; i < 16; i++) to[i] = f(i);
    return to;
}

// a b + a' b' + sum of two pairs, denormals flushed. Processors differ in the order in which they add and round.
inline float dot(float sum, const uint16_t* a, const uint16_t* b) {
    sum = flushed(std::fma(flushed(from_bf16(a[1])), flushed(from_bf16(b[1])), flushed(sum)));
    return flushed(std::fma(flushed(from_bf16(a[0])), flushed(from_bf16(b[0])), sum));
}

}  // namespace emulated

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float x) { return emulated::lanes([&](int) { return x; }); }
inline __m512i _mm512_set1_epi32(int x) { return (__m512i)(emulated::Ints{} + x); }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return emulated::lanes([&](int i) { return a[i] > b[i] ? a[i] : b[i]; }); }
inline __m512 _mm512_min_ps(__m512 a, __m512 b) { return emulated::lanes([&](int i) { return a[i] < b[i] ? a[i] : b[i]; }); }
inline __m512 _mm512_rcp14_ps(__m512 x) {  // 14 bits of it are right
    return emulated::lanes([&](int i) { return emulated::bits<float>(emulated::bits<uint32_t>(1 / x[i]) & 0xfffffe00); });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated::lanes([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, -c); }
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(-a, b, c); }
inline float _mm512_reduce_add_ps(__m512 x) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}
inline float _mm512_reduce_max_ps(__m512 x) {
    float most = x[0];
    for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
    return most;
}

inline __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
inline __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
inline __m256i _mm512_castsi512_si256(__m512i x) { return __m256i{x[0], x[1], x[2], x[3]}; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i x, unsigned by) { return (__m512i)((emulated::Words)x << by); }
template <class Lane, class From>
inline __m512i emulated_widen(From from) {
    emulated::Ints to;
    for (int i = 0; i < 16; i++) {
        Lane lane;
        std::memcpy(&lane, (const char*)&from + i * sizeof lane, sizeof lane);
        to[i] = lane;
    }
    return (__m512i)to;
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) { return emulated_widen<uint16_t>(x); }
inline __m512i _mm512_cvtepi8_epi16(__m256i x) {
    return (__m512i)__builtin_convertvector((emulated::Bytes)x, emulated::Shorts);
}
inline __m256i _mm256_cvtepu8_epi16(__m128i x) {
    return (__m256i)__builtin_convertvector((emulated::Bytes16)x, emulated::Words16);
}
inline __m512i _mm512_castsi256_si512(__m256i x) { return __m512i{x[0], x[1], x[2], x[3]}; }
inline __m512i _mm512_inserti64x4(__m512i x, __m256i y, int half) {
    for (int i = 0; i < 4; i++) x[4 * half + i] = y[i];
    return x;
}
inline __m512i _mm512_mulhrs_epi16(__m512i a, __m512i b) {
    emulated::Shorts to, x = (emulated::Shorts)a, y = (emulated::Shorts)b;
    for (int i = 0; i < 32; i++) to[i] = int16_t((((x[i] * y[i]) >> 14) + 1) >> 1);
    return (__m512i)to;
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
    emulated::Ints to;
    emulated::Shorts x = (emulated::Shorts)a, y = (emulated::Shorts)b;
    for (int i = 0; i < 16; i++) to[i] = int32_t(uint32_t(x[2 * i] * y[2 * i]) + uint32_t(x[2 * i + 1] * y[2 * i + 1]));
    return (__m512i)to;
}
inline __m512i _mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
    return (__m512i)((emulated::Words)sums + (emulated::Words)_mm512_madd_epi16(a, b));
}
inline __m256bh _mm512_cvtneps_pbh(__m512 x) {
    __m256bh to;
    for (int i = 0; i < 16; i++) to[i] = emulated::to_bf16(x[i]);
    return to;
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    uint16_t left[32], right[32];
    std::memcpy(left, &a, sizeof left), std::memcpy(right, &b, sizeof right);
    return emulated::lanes([&](int i) { return emulated::dot(sum[i], left + 2 * i, right + 2 * i); });
}

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {  // not less than, or one is NaN
    if (predicate != _CMP_NLT_UQ) __builtin_trap();
    unsigned mask = 0;
    for (int i = 0; i < 16; i++) mask |= unsigned(!(a[i] < b[i])) << i;
    return __mmask16(mask);
}
inline __m512 _mm512_mask_mov_ps(__m512 other, __mmask16 mask, __m512 x) {
    return emulated::lanes([&](int i) { return mask >> i & 1 ? x[i] : other[i]; });
}
inline __m512i _mm512_maskz_add_epi32(__mmask16 mask, __m512i a, __m512i b) {
    emulated::Words sum = (emulated::Words)a + (emulated::Words)b;
    for (int i = 0; i < 16; i++)
        if (!(mask >> i & 1)) sum[i] = 0;
    return (__m512i)sum;
}

template <class To>
inline To emulated_load(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
inline void emulated_aligned(const void* at, uintptr_t bytes) {  // the processor faults otherwise
    if ((uintptr_t)at % bytes) __builtin_trap();
}
inline __m512 _mm512_load_ps(const void* from) { return emulated_aligned(from, 64), emulated_load<__m512>(from); }
inline __m512 _mm512_loadu_ps(const void* from) { return emulated_load<__m512>(from); }
inline __m512i _mm512_load_si512(const void* from) { return emulated_aligned(from, 64), emulated_load<__m512i>(from); }
inline __m256i _mm256_loadu_si256(const __m256i* from) { return emulated_load<__m256i>(from); }
inline void _mm512_store_ps(void* to, __m512 x) { emulated_aligned(to, 64), std::memcpy(to, &x, sizeof x); }
inline void _mm512_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof x); }
inline void _mm512_store_si512(void* to, __m512i x) { emulated_aligned(to, 64), std::memcpy(to, &x, sizeof x); }
inline void _mm256_store_si256(__m256i* to, __m256i x) { emulated_aligned(to, 32), std::memcpy(to, &x, sizeof x); }
inline void _mm256_storeu_si256(__m256i* to, __m256i x) { std::memcpy(to, &x, sizeof x); }
inline void _mm512_mask_store_ps(void* to, __mmask16 mask, __m512 x) {
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) ((float*)to)[i] = x[i];
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {  // what is masked is not touched
    emulated::Words16 to{};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) to[i] = ((const uint16_t*)from)[i];
    return (__m256i)to;
}
inline void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i x) {
    emulated::Words16 from = (emulated::Words16)x;
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) ((uint16_t*)to)[i] = from[i];
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
    __m512bh to{};
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) to[i] = ((const uint16_t*)from)[i];
    return (__m512i)to;
}

// AMX: eight tiles per thread, each of 16 rows of 64 bytes, once palette 1 was loaded with that.
namespace emulated {

inline thread_local char configuration[64];
inline thread_local char tiles[8][16][64];

inline char (*tile(int number))[64] {
    bool whole = configuration[0] == 1 && configuration[16 + 2 * number] == 64 && configuration[48 + number] == 16;
    if (!whole) __builtin_trap();
    return tiles[number];
}

}  // namespace emulated

inline void _tile_storeconfig(void* to) { std::memcpy(to, emulated::configuration, 64); }
inline void _tile_loadconfig(const void* from) {
    std::memcpy(emulated::configuration, from, 64);
    std::memset(emulated::tiles, 0, sizeof emulated::tiles);
}
inline void _tile_zero(int tile) { std::memset(emulated::tile(tile), 0, 1024); }
inline void _tile_loadd(int tile, const void* from, size_t stride) {
    for (int row = 0; row < 16; row++) std::memcpy(emulated::tile(tile)[row], (const char*)from + row * stride, 64);
}
inline void _tile_stored(int tile, void* to, size_t stride) {
    for (int row = 0; row < 16; row++) std::memcpy((char*)to + row * stride, emulated::tile(tile)[row], 64);
}
inline void _tile_dpbf16ps(int sums, int left, int right) {  // sums(m, n) += left(m, 2k, 2k + 1) . right(k, 2n, 2n + 1)
    for (int m = 0; m < 16; m++) {
        float row[16];
        uint16_t a[32], b[32];
        std::memcpy(row, emulated::tile(sums)[m], 64), std::memcpy(a, emulated::tile(left)[m], 64);
        for (int k = 0; k < 16; k++) {
            std::memcpy(b, emulated::tile(right)[k], 64);
            for (int n = 0; n < 16; n++) row[n] = emulated::dot(row[n], a + 2 * k, b + 2 * n);
        }
        std::memcpy(emulated::tile(sums)[m], row, 64);
    }
}

#define syscall(...) 0L  // Linux grants the tiles that are here
