// Weights of four kinds as they lie in memory, and the inputs and outputs of products with them.

#pragma once

#include "simd.h"

extern "C" {

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };

// (rows, columns) in row order. INT8: w = q scale[row]. INT4: for 32 columns 16 bytes, byte j with column j in its low
// half and column j + 16 in its high half, and grid[row, group] = (s, z) in bfloat16: w = (q - 8) s + z.
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

constexpr int GROUP = 32;  // columns of INT4 that share a grid

// 16 weights of the other kinds; INT8's without their scale.
template <Kind kind>
inline Vector weights_at(const Matrix& m, size_t at) {
    if constexpr (kind == FLOAT32) return load<Vector>((const float*)m.weights + at);
    if constexpr (kind == BFLOAT16) return bf16_to_f32(load<Halves>((const uint16_t*)m.weights + at));
    if constexpr (kind == INT8)
        return __builtin_convertvector(whole(load<Bytes>((const int8_t*)m.weights + at)), Vector);
}

// A group of INT4: w = q s + z, where z takes in that q counts from 8.
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

// 32 weights of any kind.
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

// Have weights come that are wanted some rows later: rows are short, and the processor guesses no further than one.
template <Kind kind>
inline void ahead(const Matrix& m, size_t at) {
    constexpr int bits = kind == FLOAT32 ? 32 : kind == BFLOAT16 ? 16 : kind == INT8 ? 8 : 4;
    __builtin_prefetch((const char*)m.weights + at * bits / 8);
}

// Inputs of a product, `width` apart, and what `prepare` made of them.
struct Inputs {
    const float* x;
    size_t width;
    int count;
    const float* sums;      // of INT4's groups, (count, columns / 32)
    const uint32_t* parts;  // for tiles, see gemm_amx.h; null without

    const float* row(int b) const { return x + b * width; }
};

// Where the results go, an input's `width` after the last one's.
struct Outputs {
    float* y;
    size_t width;

    float* row(int b) const { return y + b * width; }
};

}  // namespace
