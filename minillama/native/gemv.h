// Batched matrix-vector product y = W x + b. Each weight is read once and multiplied in float32.

#pragma once

#include <algorithm>

#include "gemm_amx.h"
#include "matrix.h"

namespace {

constexpr int BLOCK = 8;  // weight rows per block, which stay in the L1 cache for all inputs
constexpr int MANY = 4;   // inputs from which on unpacking nibbles costs more than dequantizing to float32

inline void write(const Matrix& m, int row, float y, float* out) {
    if (m.kind == INT8) y *= m.scale[row];
    out[row] = m.bias ? y + m.bias[row] : y;
}

// Matrix product of R weight rows with B inputs, from input `first` on.
template <Kind kind, int R, int B>
inline void tile(const Matrix& m, int row, const Inputs& in, int first, const Outputs& out) {
    Vector total[R][B] = {};
    for (int i = 0; i < m.columns; i += WIDTH) {
        Vector x[B];
        for (int b = 0; b < B; b++) x[b] = load<Vector>(in.row(first + b) + i);
        for (int r = 0; r < R; r++) {
            ahead<kind>(m, size_t(row + r + R) * m.columns + i);
            Vector w = weights_at<kind>(m, size_t(row + r) * m.columns + i);
            for (int b = 0; b < B; b++) total[r][b] += w * x[b];
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) write(m, row + r, sum(total[r][b]), out.row(first + b));
}

// The same for INT4, whose zero points multiply the sum of a group's inputs.
template <int R, int B>
inline void tile_int4(const Matrix& m, int row, const Inputs& in, int first, const Outputs& out) {
    int groups = m.columns / GROUP;
    Vector total[R][B] = {};
    float offsets[R][B] = {};
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < R; r++) {
            ahead<INT4>(m, (size_t(row + r + R) * groups + g) * GROUP);
            Group group(m, size_t(row + r) * groups + g);
            for (int b = 0; b < B; b++) {
                const float* x = in.row(first + b) + GROUP * g;
                total[r][b] += group.s * (group.low * load<Vector>(x) + group.high * load<Vector>(x + WIDTH));
                offsets[r][b] += group.z * in.sums[(first + b) * groups + g];
            }
        }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) write(m, row + r, sum(total[r][b]) + offsets[r][b], out.row(first + b));
}

// All rows from `begin` to `end` with B inputs.
template <Kind kind, int R, int B>
void some_inputs(const Matrix& m, int begin, int end, const Inputs& in, int first, const Outputs& out) {
    int row = begin;
    if constexpr (kind == INT4) {
        for (; row + R <= end; row += R) tile_int4<R, B>(m, row, in, first, out);
        for (; row < end; row++) tile_int4<1, B>(m, row, in, first, out);
    } else {
        for (; row + R <= end; row += R) tile<kind, R, B>(m, row, in, first, out);
        for (; row < end; row++) tile<kind, 1, B>(m, row, in, first, out);
    }
}

template <Kind kind>
void all_inputs(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out) {
    int b = 0;
    for (; b + 8 <= in.count; b += 8) some_inputs<kind, 2, 8>(m, begin, end, in, b, out);
    for (; b + 4 <= in.count; b += 4) some_inputs<kind, 4, 4>(m, begin, end, in, b, out);
    for (; b < in.count; b++) some_inputs<kind, 4, 1>(m, begin, end, in, b, out);
}

// Matrix product of INT4 rows dequantized to float32.
void expanded_product(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out, float* expanded) {
    for (int row = begin; row < end; row++)
        for (int i = 0; i < m.columns; i += GROUP) {
            size_t at = size_t(row) * m.columns + i;
            ahead<INT4>(m, at + size_t(BLOCK) * m.columns);
            Vector wide[2];
            group_at<INT4>(m, at, wide);
            std::memcpy(expanded + size_t(row - begin) * m.columns + i, wide, sizeof wide);
        }
    Matrix block = {FLOAT32, end - begin, m.columns, expanded, nullptr, nullptr, m.bias ? m.bias + begin : nullptr};
    all_inputs<FLOAT32>(block, 0, end - begin, in, {out.y + begin, out.width});
}

template <Kind kind>
void product(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out, float* expanded) {
    if (in.count == 1) return some_inputs<kind, 4, 1>(m, begin, end, in, 0, out);
    if constexpr (kind != FLOAT32)
        if (in.parts) begin = multiply_with_tiles<kind>(m, begin, end, in, out);
    for (int row = begin; row < end; row += BLOCK) {
        int stop = std::min(row + BLOCK, end);
        if (kind == INT4 && in.count >= MANY) expanded_product(m, row, stop, in, out, expanded);
        else all_inputs<kind>(m, row, stop, in, out);
    }
}

// Workspace of a batched matrix-vector product.
struct Workspace {
    float *sums, *expanded;
    uint32_t* parts;
};

// `count` inputs of a matrix, with stride `width`, and the group sums or tiles that its kind needs.
Inputs prepare(const Matrix& m, const float* from, size_t width, int count, const Workspace& workspace) {
    Inputs in = {from, width, count, workspace.sums, nullptr};
    if (m.kind == INT4 && count < MANY)
        for (int b = 0; b < count; b++)
            for (int i = 0; i < m.columns; i += GROUP) {
                const float* x = in.row(b) + i;
                workspace.sums[(b * m.columns + i) / GROUP] = sum(load<Vector>(x) + load<Vector>(x + WIDTH));
            }
    if (takes_tiles(m, count)) {
        lay_out(in, m.columns, workspace.parts);
        in.parts = workspace.parts;
    }
    return in;
}

// Rows `begin` to `end` of y = W x + b for every input.
void multiply(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out, const Workspace& workspace) {
    switch (m.kind) {
        case FLOAT32: return product<FLOAT32>(m, begin, end, in, out, workspace.expanded);
        case BFLOAT16: return product<BFLOAT16>(m, begin, end, in, out, workspace.expanded);
        case INT8: return product<INT8>(m, begin, end, in, out, workspace.expanded);
        case INT4: return product<INT4>(m, begin, end, in, out, workspace.expanded);
    }
}

}  // namespace
