// Products of some inputs with a matrix unit for bfloat16 (Intel's AMX), with the accuracy of float32.
//
// A float32 is the sum of three numbers of 8 bits each, which bfloat16 holds: x = x0 + x1 + x2, cut off one after the
// other. The unit multiplies such numbers exactly and adds up in float32. Weights of 8 bits are one part, so that three
// products are w x; INT4's, multiplied out, are three, of whose nine products the six that float32 would notice are
// taken. (Henry, Tang and Heinecke 2019, arXiv 1904.06376, have the idea.)
//
// A tile is 16 rows of 64 bytes. One of weights holds 16 rows x 32 columns; one of inputs 16 pairs of columns x 16
// inputs, of each the two numbers side by side; the unit adds their product to a tile of 16 rows x 16 inputs.

#pragma once

#include "matrix.h"
#include "amx.h"

namespace {

constexpr int FEWEST = 8;  // inputs; for fewer the sums of gemv.h are as fast

}  // namespace

#ifdef __AMX_BF16__
namespace {

constexpr int TILE = SIDE * WIDTH;  // words of a tile
constexpr int PARTS = 3;
// Not for FLOAT32: to take its weights apart costs more than to multiply them.
inline bool takes_tiles(const Matrix& m, int inputs) {
    return m.kind != FLOAT32 && inputs >= FEWEST && m.columns % DEPTH == 0 && has_tiles();
}

// Words of the parts of so many inputs.
inline size_t parts_size(int inputs, int columns) {
    return size_t(inputs + SIDE - 1) / SIDE * SIDE * columns * PARTS / 2;
}

// Two bfloat16 of neighboring columns in a word, for 32 columns; each a float32 whose lower half is to be dropped.
inline Words pairs(Vector low, Vector high) {
    Words even = (Words)__builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    Words odd = (Words)__builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return even >> 16 | (odd & 0xffff0000);
}

// The parts of 32 numbers.
inline void split(Vector low, Vector high, Words* parts) {
    for (int p = 0; p < PARTS; p++) {
        parts[p] = pairs(low, high);
        low -= (Vector)((Words)low & 0xffff0000);
        high -= (Vector)((Words)high & 0xffff0000);
    }
}

// Tiles of inputs: for each 16 of them, each 32 columns and each part one, in this order; absent inputs are 0.
void lay_out(const Inputs& in, int columns, uint32_t* parts) {
    for (int first = 0; first < in.count; first += SIDE)
        for (int k = 0; k < columns; k += DEPTH, parts += PARTS * TILE) {
            Words rows[PARTS][SIDE] = {}, of_input[PARTS];
            for (int b = 0; b < SIDE && first + b < in.count; b++) {
                const float* x = in.row(first + b) + k;
                split(load<Vector>(x), load<Vector>(x + WIDTH), of_input);
                for (int p = 0; p < PARTS; p++) rows[p][b] = of_input[p];
            }
            for (int p = 0; p < PARTS; p++) {
                transpose(rows[p]);
                for (int i = 0; i < SIDE; i++) store(parts + p * TILE + i * WIDTH, rows[p][i]);
            }
        }
}

// 16 rows x 32 columns of weights as tiles, one per part: where they lie, or written to `made`.
struct WeightTiles {
    const void* first;
    size_t stride;  // bytes of a row
};

template <Kind kind>
inline WeightTiles weight_tiles(const Matrix& m, int row, int k, uint32_t* made) {
    size_t at = size_t(row) * m.columns + k;
    if constexpr (kind == BFLOAT16) return {(const uint16_t*)m.weights + at, size_t(m.columns) * 2};
    for (int r = 0; r < SIDE; r++, at += m.columns) {
        Vector wide[2];
        group_at<kind>(m, at, wide);
        if constexpr (kind == INT8) {
            store(made + r * WIDTH, pairs(wide[0], wide[1]));
        } else {
            Words parts[PARTS];
            split(wide[0], wide[1], parts);
            for (int p = 0; p < PARTS; p++) store(made + p * TILE + r * WIDTH, parts[p]);
        }
    }
    asm volatile("" ::: "memory");  // GCC does not know that tiles are loaded from there
    return {made, 4 * WIDTH};
}

// Tiles 0 and 1 add up the products of the largest parts for 16 rows each, 2 and 3 the others; 4 to 6 hold the inputs'
// parts and 7 the weights. The numbers of tiles are part of the instructions.
template <Kind kind, int R>
inline void multiply_tiles(const Matrix& m, int row, const uint32_t* parts, uint32_t* made) {
    constexpr bool exact = kind == BFLOAT16 || kind == INT8;
    constexpr int side = 4 * WIDTH;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < m.columns; k += DEPTH, parts += PARTS * TILE) {
        asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
        for (int r = 0; r < SIDE * R; r++) ahead<kind>(m, size_t(row + r + SIDE * R) * m.columns + k);
        _tile_loadd(4, parts, side);
        _tile_loadd(5, parts + TILE, side);
        _tile_loadd(6, parts + 2 * TILE, side);
        WeightTiles w = weight_tiles<kind>(m, row, k, made);
        _tile_loadd(7, w.first, w.stride);
        _tile_dpbf16ps(0, 7, 4);
        _tile_dpbf16ps(2, 7, 5);
        _tile_dpbf16ps(2, 7, 6);
        if (!exact) {
            _tile_loadd(7, made + TILE, side);
            _tile_dpbf16ps(2, 7, 4);
            _tile_dpbf16ps(2, 7, 5);
            _tile_loadd(7, made + 2 * TILE, side);
            _tile_dpbf16ps(2, 7, 4);
        }
        if constexpr (R == 2) {
            w = weight_tiles<kind>(m, row + SIDE, k, made + PARTS * TILE);
            _tile_loadd(7, w.first, w.stride);
            _tile_dpbf16ps(1, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
            _tile_dpbf16ps(3, 7, 6);
            if (!exact) {
                _tile_loadd(7, made + 4 * TILE, side);
                _tile_dpbf16ps(3, 7, 4);
                _tile_dpbf16ps(3, 7, 5);
                _tile_loadd(7, made + 5 * TILE, side);
                _tile_dpbf16ps(3, 7, 4);
            }
        }
    }
}

// Write 16 rows of results of up to 16 inputs.
inline void write(const Matrix& m, int row, const float* sums, const float* rest, int inputs, const Outputs& out) {
    Vector y[SIDE];
    for (int i = 0; i < SIDE; i++) y[i] = load<Vector>(sums + i * WIDTH) + load<Vector>(rest + i * WIDTH);
    transpose(y);
    Vector scale = m.kind == INT8 ? load<Vector>(m.scale + row) : Vector{} + 1;
    Vector bias = m.bias ? load<Vector>(m.bias + row) : Vector{};
    for (int b = 0; b < inputs; b++) store(out.row(b) + row, y[b] * scale + bias);
}

template <Kind kind, int R>
inline void tile_rows(const Matrix& m, int row, const Inputs& in, const Outputs& out) {
    alignas(64) uint32_t made[2 * PARTS * TILE];
    alignas(64) float sums[4][TILE];
    for (int first = 0; first < in.count; first += SIDE) {
        multiply_tiles<kind, R>(m, row, in.parts + parts_size(first, m.columns), made);
        _tile_stored(0, sums[0], 4 * WIDTH);
        _tile_stored(2, sums[2], 4 * WIDTH);
        int count = in.count - first < SIDE ? in.count - first : SIDE;
        Outputs to = {out.row(first), out.width};
        write(m, row, sums[0], sums[2], count, to);
        if constexpr (R == 2) {
            _tile_stored(1, sums[1], 4 * WIDTH);
            _tile_stored(3, sums[3], 4 * WIDTH);
            write(m, row + SIDE, sums[1], sums[3], count, to);
        }
    }
}

// Rows from `begin` on, as far as whole tiles go before `end`; returns the first row that is left.
template <Kind kind>
int multiply_with_tiles(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out) {
    int row = begin;
    for (; row + 2 * SIDE <= end; row += 2 * SIDE) tile_rows<kind, 2>(m, row, in, out);
    for (; row + SIDE <= end; row += SIDE) tile_rows<kind, 1>(m, row, in, out);
    return row;
}

}  // namespace
#else
namespace {

inline bool takes_tiles(const Matrix&, int) { return false; }
inline size_t parts_size(int, int) { return 0; }
inline void lay_out(const Inputs&, int, uint32_t*) {}
template <Kind kind>
int multiply_with_tiles(const Matrix&, int begin, int, const Inputs&, const Outputs&) {
    return begin;
}

}  // namespace
#endif
