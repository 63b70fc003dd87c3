// Tiled matrix products in bfloat16 with float32 accumulation, by AMX or AVX-512 BF16, and packing into tiles.
//
// A left operand has 16 rows and 32 columns, a right one 32 rows and 16 columns, with rows 2p and 2p + 1 interleaved
// (VNNI layout). Either is 1 KiB.

#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "amx.h"

namespace {

constexpr int HALVES = SIDE * DEPTH;  // bfloat16 values per tile
constexpr int FLOATS = SIDE * SIDE;

typedef int32_t Row __attribute__((vector_size(64)));  // of a tile: pairs of bfloat16, or float32

// 2D array of tiles. The second index of both operands is the inner dimension.
template <class T>
struct Grid {
    T* first;
    int across;
    T* operator()(int i, int j) const { return first + (size_t(i) * across + j) * (sizeof(T) == 2 ? HALVES : FLOATS); }
    size_t row() const { return size_t(across) * (sizeof(T) == 2 ? HALVES : FLOATS); }
};
typedef Grid<Half> Tiles;
typedef Grid<float> Sums;

// Bump allocator of a thread's workspace.
struct Memory {
    char* next;
    template <class T>
    Grid<T> take(int down, int across) {
        Grid<T> grid = {(T*)next, across};
        next += size_t(down) * across * 1024;
        return grid;
    }
    float* floats(int count) {
        float* taken = (float*)next;
        next += size_t(count) * sizeof(float);
        return taken;
    }
};

#ifdef __AMX_BF16__

// c(m, n) = or += sum over `depth` tiles of a(m, .) b(n, .) for M x N tiles.
template <int M, int N>
inline void multiply(bool fresh, float* c, size_t c_row, const Half* a, size_t a_row, const Half* b, size_t b_row, int depth) {
    asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
    if (fresh) {
        _tile_zero(0);
        if (N > 1) _tile_zero(1);
        if (M > 1) _tile_zero(2);
        if (M > 1 && N > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64);
        if (N > 1) _tile_loadd(1, c + FLOATS, 64);
        if (M > 1) _tile_loadd(2, c + c_row, 64);
        if (M > 1 && N > 1) _tile_loadd(3, c + c_row + FLOATS, 64);
    }
    for (int d = 0; d < depth; d++) {
        _tile_loadd(4, a + d * HALVES, 64);
        _tile_loadd(6, b + d * HALVES, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, b + b_row + d * HALVES, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, a + a_row + d * HALVES, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 64);
    if (N > 1) _tile_stored(1, c + FLOATS, 64);
    if (M > 1) _tile_stored(2, c + c_row, 64);
    if (M > 1 && N > 1) _tile_stored(3, c + c_row + FLOATS, 64);
}

#else

template <int M, int N>
inline void multiply(bool fresh, float* c, size_t c_row, const Half* a, size_t a_row, const Half* b, size_t b_row, int depth) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float* to = c + m * c_row + n * FLOATS;
            __m512 rows[SIDE];
            for (int r = 0; r < SIDE; r++) rows[r] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(to + r * SIDE);
            for (int d = 0; d < depth; d++) {
                const int32_t* left = (const int32_t*)(a + m * a_row + d * HALVES);
                const Half* right = b + n * b_row + d * HALVES;
                for (int p = 0; p < SIDE; p++) {
                    __m512bh pairs = (__m512bh)_mm512_load_si512(right + p * DEPTH);
                    for (int r = 0; r < SIDE; r++)
                        rows[r] = _mm512_dpbf16_ps(rows[r], (__m512bh)_mm512_set1_epi32(left[r * SIDE + p]), pairs);
                }
            }
            for (int r = 0; r < SIDE; r++) _mm512_store_ps(to + r * SIDE, rows[r]);
        }
}

#endif

struct Range {
    int from, to;
};

// c(i, j) = or += sum over s of a(i, s) b(j, s).
void product(bool fresh, Sums c, Range rows, Range columns, Tiles a, Tiles b, Range depth) {
    int d = depth.from, count = depth.to - depth.from;
    if (count <= 0) return;
    for (int i = rows.from; i < rows.to; i += 2)
        for (int j = columns.from; j < columns.to; j += 2) {
            auto run = i + 1 < rows.to ? j + 1 < columns.to ? multiply<2, 2> : multiply<2, 1>
                                       : j + 1 < columns.to ? multiply<1, 2> : multiply<1, 1>;
            run(fresh, c(i, j), c.row(), a(i, d), a.row(), b(j, d), b.row(), count);
        }
}

// Two rows of a right operand, interleaved.
inline __m512i paired(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

inline __m512i paired(__m512 even, __m512 odd) { return paired(f32_to_bf16(even), f32_to_bf16(odd)); }

// A matrix (T, E), rows `stride` apart.
struct Rows {
    const Half* first;
    int64_t stride;
    int tokens, width;

    Rows from(int token) const { return {first + token * stride, stride, tokens - token, width}; }

    // 32 values of a row, zero-padded.
    __m512i load(int token, int from) const {
        int count = token < tokens ? std::min(DEPTH, width - from) : 0;
        return count <= 0 ? _mm512_setzero_si512()
                          : _mm512_maskz_loadu_epi16(__mmask32(0xffffffffu >> (DEPTH - count)), first + token * stride + from);
    }
};

void store_tile(Half* tile, const Row* rows) {
    for (int r = 0; r < SIDE; r++) _mm512_store_si512(tile + r * DEPTH, (__m512i)rows[r]);
}

// Pack 16 tokens of X into row `row` of tiles (t, e), a left operand with inner dimension E; or X^T, a right one.
void pack_rows(const Rows& x, int t, Tiles to, int row, bool transposed) {
    for (int e = 0; e < to.across; e++) {
        Row rows[SIDE];
        for (int r = 0; r < SIDE; r++) rows[r] = (Row)x.load(t * SIDE + r, e * DEPTH);
        if (transposed) transpose(rows);
        store_tile(to(row, e), rows);
    }
}

// Pack 32 tokens of X into column s of tiles (e, s), a right operand with inner dimension T; or X^T, a left one.
void pack_pairs(const Rows& x, int s, Tiles to, bool transposed) {
    for (int e = 0; e * SIDE < x.width; e++) {
        Row rows[SIDE];
        for (int p = 0; p < SIDE; p++) {
            __m512i even = x.load(s * DEPTH + 2 * p, e * SIDE), odd = x.load(s * DEPTH + 2 * p + 1, e * SIDE);
            rows[p] = (Row)paired(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd));
        }
        if (transposed) transpose(rows);
        store_tile(to(e, s), rows);
    }
}

}  // namespace
