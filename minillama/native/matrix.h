// Weight matrices of five storage formats, and the inputs and outputs of matrix products.

#pragma once

#include "simd.h"

extern "C" {

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4, INT16 };

// (rows, columns), row-major. INT8 and INT16: w = q scale[row]. INT4: 16 bytes per 32 columns, byte j with column j in
// its low nibble and column j + 16 in its high one, and grid[row, group] = (s, z) of 16 bits each: with the nibble u,
// w = (round(u s / 16) + z) scale[row], where the sum has 13 bits and a sign.
struct Matrix {
    Kind kind;
    int32_t rows, columns;
    const void* weights;
    const float* scale;
    const int16_t* grid;
    const float* bias;  // or null
};
}

namespace {

constexpr int GROUP = 32;  // INT4 group size, in columns

constexpr bool of_integers(Kind kind) { return kind == INT8 || kind == INT4 || kind == INT16; }

constexpr int bits(Kind kind) { return kind == FLOAT32 ? 32 : kind == INT8 ? 8 : kind == INT4 ? 4 : 16; }

// A row of a matrix, without the scale of integers.
template <Kind kind>
struct Row {
    const char* weights;
    const int16_t* grid;

    Row(const Matrix& m, int row) {
        size_t at = size_t(row) * m.columns;
        weights = (const char*)m.weights + at * bits(kind) / 8;
        grid = m.grid + at / GROUP * 2;
    }

    // WIDTH weights of a floating-point format.
    Vector floats(int i) const {
        if constexpr (kind == FLOAT32) return load<Vector>(weights + i * 4l);
        else return bf16_to_f32(load<Halves>(weights + i * 2l));
    }

    // 2 WIDTH weights of INT8 or INT16.
    Shorts integers(int i) const {
        if constexpr (kind == INT8) return whole(load<Bytes>(weights + i));
        else return load<Shorts>(weights + i * 2l);
    }

    // GROUP weights of any format of integers.
    void group(int i, Shorts* to) const {
        constexpr int N = 2 * WIDTH;
        if constexpr (kind == INT4) {
            Pairs pairs = whole(load<Nibbles>(weights + i / 2));
            join(pairs << 11 & 0x7800, pairs << 7 & 0x7800, to);
            for (int n = 0; n < GROUP / N; n++)
                to[n] = scaled(to[n], Shorts{} + grid[i / GROUP * 2]) + grid[i / GROUP * 2 + 1];
        } else {
            for (int n = 0; n < GROUP / N; n++) to[n] = integers(i + n * N);
        }
    }
};

// Inputs of a matrix product, with stride `width`, and the results of `prepare`.
struct Inputs {
    const float* x;
    size_t width;
    int count;
    const int16_t* integers;  // (count, columns): x = q scales[input, span] for the formats of integers
    const float* scales;
    const float* sums;      // of q per INT4 group, SPAN / GROUP per span
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
