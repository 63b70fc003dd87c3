// Weight matrices of four storage formats, and the inputs and outputs of matrix products.

#pragma once

#include "simd.h"

extern "C" {

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };

// (rows, columns), row-major. INT8: w = q scale[row]. INT4: 16 bytes per 32 columns, byte j with column j in its low
// nibble and column j + 16 in its high one, and scale and zero point grid[row, group] = (s, z) in bfloat16:
// w = (q - 8) s + z.
struct Matrix {
    Kind kind;
    int32_t rows, columns;
    const void* weights;
    const float* scale;
    const uint16_t* grid;
    const float* bias;  // or null
};
}

namespace {

constexpr int GROUP = 32;  // INT4 group size, in columns

// 16 weights of the other formats; INT8 without its scale.
template <Kind kind>
inline Vector weights_at(const Matrix& m, size_t at) {
    if constexpr (kind == FLOAT32) return load<Vector>((const float*)m.weights + at);
    if constexpr (kind == BFLOAT16) return bf16_to_f32(load<Halves>((const uint16_t*)m.weights + at));
    if constexpr (kind == INT8)
        return __builtin_convertvector(whole(load<Bytes>((const int8_t*)m.weights + at)), Vector);
}

// INT4 group w = q s + z for unsigned q, so that z includes -8 s.
struct Group {
    Vector low, high;
    float s, z;

    Group(const Matrix& m, size_t at) {
        Ints pairs = whole(load<Nibbles>((const uint8_t*)m.weights + GROUP / 2 * at));
        low = __builtin_convertvector(pairs & 15, Vector);
        high = __builtin_convertvector(pairs >> 4, Vector);
        s = bf16_to_f32(m.grid[2 * at]);
        z = bf16_to_f32(m.grid[2 * at + 1]) - 8 * s;
    }
};

// 32 weights of any format, dequantized except for the scale of INT8.
template <Kind kind>
inline void group_at(const Matrix& m, size_t at, Vector* to) {
    if constexpr (kind == INT4) {
        Group group(m, at / GROUP);
        to[0] = group.low * group.s + group.z;
        to[1] = group.high * group.s + group.z;
    } else {
        to[0] = weights_at<kind>(m, at);
        to[1] = weights_at<kind>(m, at + WIDTH);
    }
}

// Prefetch of weights some rows ahead: rows are short, and the hardware prefetcher stops at the end of one.
template <Kind kind>
inline void ahead(const Matrix& m, size_t at) {
    constexpr int bits = kind == FLOAT32 ? 32 : kind == BFLOAT16 ? 16 : kind == INT8 ? 8 : 4;
    __builtin_prefetch((const char*)m.weights + at * bits / 8);
}

// Inputs of a matrix product, with stride `width`, and the results of `prepare`.
struct Inputs {
    const float* x;
    size_t width;
    int count;
    const float* sums;      // per INT4 group, (count, columns / 32)
    const uint32_t* parts;  // AMX tiles, see gemm_amx.h; or null

    const float* row(int b) const { return x + b * width; }
};

// Outputs, with stride `width` per input.
struct Outputs {
    float* y;
    size_t width;

    float* row(int b) const { return y + b * width; }
};

}  // namespace
