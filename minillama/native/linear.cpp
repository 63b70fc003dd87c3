// Linear layer y = x W^T + b in float32 by AMX in split bfloat16. Compiled by build.py, called by linear.py.
//
// Each operand is a sum of bfloat16 parts, x = x0 + x1, each the rest rounded to the nearest; the products x_i w_j with
// i + j < PARTS are added up in float32 (Henry, Tang and Heinecke 2019, arXiv 1904.06376). Weights are split and packed
// into tiles once, inputs at each call. Three parts are as exact as float32, and hardly faster.

#include "gemm_bf16.h"

namespace {

constexpr int PARTS = 2;
constexpr int STEP = PARTS * HALVES;  // from tile to tile along the width; the parts of one are adjacent
constexpr int BLOCK = 8;              // tiles of 16 tokens, whose sums stay in the L1 cache
constexpr int DEEP = 8;               // tiles of 32 along the width, of which a strip of weights stays there as well
constexpr int COLUMNS = 8;            // tiles of 16 outputs, whose weights stay in the L2 cache for all blocks

// Pack 16 rows of a matrix (N, K) in float32, or fewer and zeros, into tiles of each part.
void pack(const float* x, int rows, int width, Half* tiles, bool transposed) {
    for (int k = 0; k < width; k += DEPTH, tiles += STEP) {
        for (int r = 0; r < SIDE; r++)
            for (int half = 0; half < DEPTH; half += SIDE) {
                __m512 rest = r < rows ? _mm512_loadu_ps(x + size_t(r) * width + k + half) : _mm512_setzero_ps();
                for (int p = 0; p < PARTS; p++) {
                    __m256i part = f32_to_bf16(rest);
                    rest = _mm512_sub_ps(rest, bf16_to_f32(part));
                    _mm256_storeu_si256((__m256i*)(tiles + p * HALVES + r * DEPTH + half), part);
                }
            }
        for (int p = 0; p < PARTS && transposed; p++) {
            Row rows[SIDE];
            for (int r = 0; r < SIDE; r++) rows[r] = (Row)_mm512_load_si512(tiles + p * HALVES + r * DEPTH);
            transpose(rows);
            store_tile(tiles + p * HALVES, rows);
        }
    }
}

// c = or += a b for two by two tiles; a and b have `row` values per tile of tokens or outputs.
inline void multiply_parts(bool fresh, float* c, const Half* a, const Half* b, size_t row, int depth) {
    asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + FLOATS, 64);
        _tile_loadd(2, c + 2 * FLOATS, 64);
        _tile_loadd(3, c + 3 * FLOATS, 64);
    }
    for (int d = 0; d < depth; d++, a += STEP, b += STEP)
#pragma GCC unroll 3
        for (int p = PARTS - 1; p >= 0; p--) {
            _tile_loadd(4, a + p * HALVES, 64);
            _tile_loadd(5, a + row + p * HALVES, 64);
#pragma GCC unroll 3
            for (int q = 0; p + q < PARTS; q++) {
                if (q || p != PARTS - 2) {  // there it is loaded already
                    _tile_loadd(6, b + q * HALVES, 64);
                    _tile_loadd(7, b + row + q * HALVES, 64);
                }
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + FLOATS, 64);
    _tile_stored(2, c + 2 * FLOATS, 64);
    _tile_stored(3, c + 3 * FLOATS, 64);
}

}  // namespace

extern "C" {

// Request the AMX tile registers from Linux, once per process. Returns whether the kernels can run.
int32_t minillama_ready() { return has_tiles(); }

// Split and pack weights (M, K), M and K multiples of 32.
void minillama_linear_pack(int32_t outputs, int32_t width, int32_t threads, const float* weights, Half* packed) {
#pragma omp parallel for num_threads(threads)
    for (int m = 0; m < outputs; m += SIDE)
        pack(weights + size_t(m) * width, SIDE, width, packed + size_t(m) * width * PARTS, true);
}

// y (N, M) of x (N, K) and packed weights; `work` has room for the parts of x, N rounded up to 32. bias or null.
void minillama_linear(int32_t tokens, int32_t outputs, int32_t width, int32_t threads, const float* x,
                      const Half* packed, const float* bias, Half* work, float* y) {
    const int tiles = (tokens + DEPTH - 1) / DEPTH * 2, across = outputs / SIDE, deep = width / DEPTH;
    const int blocks = (tiles + BLOCK - 1) / BLOCK, chunks = (across + COLUMNS - 1) / COLUMNS;
    const size_t row = size_t(deep) * STEP;
#pragma omp parallel num_threads(threads)
    {
        TileUnit unit;
        alignas(64) float sums[BLOCK * 2 * FLOATS];
#pragma omp for
        for (int t = 0; t < tiles; t++)
            pack(x + size_t(t) * SIDE * width, tokens - t * SIDE, width, work + t * row, false);
#pragma omp for collapse(2) schedule(static)
        for (int chunk = 0; chunk < chunks; chunk++)
            for (int block = 0; block < blocks; block++) {
                const int first = block * BLOCK, count = std::min(BLOCK, tiles - first);
                for (int j = chunk * COLUMNS; j < std::min(chunk * COLUMNS + COLUMNS, across); j += 2) {
                    for (int k = 0; k < deep; k += DEEP)
                        for (int i = 0; i < count; i += 2)
                            multiply_parts(!k, sums + i * 2 * FLOATS, work + (first + i) * row + k * STEP,
                                           packed + j * row + k * STEP, row, std::min(DEEP, deep - k));
                    for (int r = 0; r < std::min(count * SIDE, tokens - first * SIDE); r++)
                        for (int i = 0; i < 2; i++) {
                            const int column = (j + i) * SIDE;
                            __m512 sum = _mm512_load_ps(sums + (r / SIDE * 2 + i) * FLOATS + r % SIDE * SIDE);
                            if (bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias + column));
                            _mm512_storeu_ps(y + size_t(first * SIDE + r) * outputs + column, sum);
                        }
                }
            }
    }
}
}
