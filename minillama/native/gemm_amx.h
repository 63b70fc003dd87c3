// Batched matrix-vector products by AMX in split bfloat16, with float32 accuracy.
//
// A float32 is the sum of three bfloat16 parts of 8 significant bits each, x = x0 + x1 + x2, by successive truncation.
// AMX multiplies them exactly and accumulates in float32. Weights of 8 bits are one part, so that w x is three
// products; INT4 weights of 14 bits are two, of whose six products the last is left out (Henry, Tang and Heinecke 2019,
// arXiv 1904.06376).
//
// A tile is 16 rows of 64 bytes. A weight tile holds 16 rows x 32 columns; an input tile 16 pairs of columns x 16
// inputs, the two of a pair adjacent; their product is added to a tile of 16 rows x 16 inputs.

#pragma once

#include "matrix.h"
#include "amx.h"

namespace {

constexpr int FEWEST = 8;  // inputs; for fewer gemv.h is as fast

}  // namespace

#ifdef __AMX_BF16__
namespace {

constexpr int TILE = SIDE * WIDTH;  // 32-bit words per tile
constexpr int PARTS = 3;         // of inputs
constexpr int WEIGHT_PARTS = 2;  // at most
// Not for FLOAT32: splitting its weights costs more than multiplying them.
inline bool takes_tiles(const Matrix& m, int inputs) {
    return m.kind != FLOAT32 && inputs >= FEWEST && m.columns % DEPTH == 0 && has_tiles();
}

// 32-bit words of the parts of all inputs.
inline size_t parts_size(int inputs, int columns) {
    return size_t(inputs + SIDE - 1) / SIDE * SIDE * columns * PARTS / 2;
}

// Adjacent columns as two bfloat16 per word, for 32 columns; float32 values are truncated.
inline Words pairs(Vector low, Vector high) {
    Words even = (Words)__builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    Words odd = (Words)__builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return even >> 16 | (odd & 0xffff0000);
}

// Split of 32 values into bfloat16 parts.
inline void split(Vector low, Vector high, Words* parts, int count = PARTS) {
    for (int p = 0; p < count; p++) {
        parts[p] = pairs(low, high);
        low -= (Vector)((Words)low & 0xffff0000);
        high -= (Vector)((Words)high & 0xffff0000);
    }
}

// Pack inputs into tiles: one per 16 inputs, 32 columns and part, in this order; zero-padded.
void lay_out(const Inputs& in, int columns, uint32_t* parts) {
    for (int first = 0; first < in.count; first += SIDE)
        for (int k = 0; k < columns; k += DEPTH, parts += PARTS * TILE) {
            Words rows[PARTS][SIDE] = {}, input_parts[PARTS];
            for (int b = 0; b < SIDE && first + b < in.count; b++) {
                const float* x = in.row(first + b) + k;
                split(load<Vector>(x), load<Vector>(x + WIDTH), input_parts);
                for (int p = 0; p < PARTS; p++) rows[p][b] = input_parts[p];
            }
            for (int p = 0; p < PARTS; p++) {
                transpose(rows[p]);
                for (int i = 0; i < SIDE; i++) store(parts + p * TILE + i * WIDTH, rows[p][i]);
            }
        }
}

// Weight tiles of 16 rows x 32 columns, one per part: in place, or packed into `packed`.
struct WeightTiles {
    const void* first;
    size_t stride;  // bytes per row
};

template <Kind kind>
inline WeightTiles weight_tiles(const Matrix& m, int row, int k, uint32_t* packed) {
    if constexpr (kind == BFLOAT16) return {Row<kind>(m, row).weights + k * 2l, size_t(m.columns) * 2};
    for (int r = 0; r < SIDE; r++) {
        Shorts weights;
        Row<kind>(m, row + r).group(k, &weights);
        Halves halves[2];
        std::memcpy(halves, &weights, sizeof weights);
        typedef int16_t Signed __attribute__((vector_size(2 * WIDTH)));
        Words parts[WEIGHT_PARTS];
        constexpr int count = kind == INT8 ? 1 : WEIGHT_PARTS;
        split(__builtin_convertvector((Signed)halves[0], Vector), __builtin_convertvector((Signed)halves[1], Vector),
              parts, count);
        for (int p = 0; p < count; p++) store(packed + p * TILE + r * WIDTH, parts[p]);
    }
    asm volatile("" ::: "memory");  // GCC does not know that tiles are loaded from there
    return {packed, 4 * WIDTH};
}

// Tiles 0 and 1 accumulate the products of the leading parts for 16 rows each, 2 and 3 the others; 4 to 6 hold the
// inputs' parts and 7 the weights. Tile numbers are immediates of the instructions.
template <Kind kind, int R>
inline void multiply_tiles(const Matrix& m, int row, const uint32_t* parts, uint32_t* packed) {
    constexpr bool exact = kind == BFLOAT16 || kind == INT8;
    constexpr int side = 4 * WIDTH;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < m.columns; k += DEPTH, parts += PARTS * TILE) {
        asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
        for (int r = 0; r < SIDE * R; r++) __builtin_prefetch(Row<kind>(m, row + r + SIDE * R).weights + size_t(k) * bits(kind) / 8);
        _tile_loadd(4, parts, side);
        _tile_loadd(5, parts + TILE, side);
        _tile_loadd(6, parts + 2 * TILE, side);
        WeightTiles w = weight_tiles<kind>(m, row, k, packed);
        _tile_loadd(7, w.first, w.stride);
        _tile_dpbf16ps(0, 7, 4);
        _tile_dpbf16ps(2, 7, 5);
        _tile_dpbf16ps(2, 7, 6);
        if (!exact) {
            _tile_loadd(7, packed + TILE, side);
            _tile_dpbf16ps(2, 7, 4);
            _tile_dpbf16ps(2, 7, 5);
        }
        if constexpr (R == 2) {
            w = weight_tiles<kind>(m, row + SIDE, k, packed + WEIGHT_PARTS * TILE);
            _tile_loadd(7, w.first, w.stride);
            _tile_dpbf16ps(1, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
            _tile_dpbf16ps(3, 7, 6);
            if (!exact) {
                _tile_loadd(7, packed + (WEIGHT_PARTS + 1) * TILE, side);
                _tile_dpbf16ps(3, 7, 4);
                _tile_dpbf16ps(3, 7, 5);
            }
        }
    }
}

// Write 16 output rows of up to 16 inputs.
inline void write(const Matrix& m, int row, const float* sums, const float* rest, int inputs, const Outputs& out) {
    Vector y[SIDE];
    for (int i = 0; i < SIDE; i++) y[i] = load<Vector>(sums + i * WIDTH) + load<Vector>(rest + i * WIDTH);
    transpose(y);
    Vector scale = of_integers(m.kind) ? load<Vector>(m.scale + row) : Vector{} + 1;
    Vector bias = m.bias ? load<Vector>(m.bias + row) : Vector{};
    for (int b = 0; b < inputs; b++) store(out.row(b) + row, y[b] * scale + bias);
}

template <Kind kind, int R>
inline void tile_rows(const Matrix& m, int row, const Inputs& in, const Outputs& out) {
    alignas(64) uint32_t packed[2 * WEIGHT_PARTS * TILE];
    alignas(64) float sums[4][TILE];
    for (int first = 0; first < in.count; first += SIDE) {
        multiply_tiles<kind, R>(m, row, in.parts + parts_size(first, m.columns), packed);
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

// Matrix product for rows from `begin` on, in whole tiles up to `end`; returns the first remaining row.
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
