// Causal attention in bfloat16 and its gradients, without ever holding the weights (FlashAttention, Dao et al. 2022,
// arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691). Compiled by building.py, called by attention.py.
//
// Everything is held by columns of queries: scores S^T (keys, queries) have the queries of a tile in the lanes of a
// vector, so that the softmax needs no sum across lanes, S^T is the left operand of dV = P^T dO and dK = dS^T Q as it is,
// and two of its rows interleaved are the right operand of O^T = V^T P^T and dQ^T = K^T dS^T.
//
// Products are of tiles: a left one of 16 rows and 32 columns, a right one of 32 rows and 16 columns, whose rows lie
// in pairs, 2p and 2p + 1 interleaved, as AMX and AVX-512 BF16 want them. Either is a kilobyte. Sums are in float32.
//
// T tokens, E width of a head. Tiles of 16 tokens are counted by t, of 32 tokens by s.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <memory>
#include <omp.h>

#include "tiles.h"

namespace {

constexpr int HALVES = SIDE * DEPTH;  // numbers of a tile in bfloat16
constexpr int FLOATS = SIDE * SIDE;
constexpr int BLOCK = 4;  // keys and queries taken at once, in units of DEPTH: what they make stays in the second cache

typedef uint16_t Half;

// Tiles in two dimensions. Of both operands the second index is the one that is summed over.
template <class T>
struct Grid {
    T* first;
    int across;
    T* operator()(int i, int j) const { return first + (size_t(i) * across + j) * (sizeof(T) == 2 ? HALVES : FLOATS); }
    size_t row() const { return size_t(across) * (sizeof(T) == 2 ? HALVES : FLOATS); }
};
typedef Grid<Half> Tiles;
typedef Grid<float> Sums;

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

struct TileUnit {};

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

inline __m512 widened(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m256i shortened(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Two rows of a right operand's pair: low halves of `even`, high halves of `odd`.
inline __m512i paired(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32(shortened(even)), high = _mm512_cvtepu16_epi32(shortened(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 2^x within 3e-6 of it, 0 below 2^-126: on [-1/2, 1/2] the polynomial of least relative error; the whole part, which
// adding 3 * 2^22 leaves in the lowest bits, goes into the exponent.
inline __m512 power_of_two(__m512 x) {
    const __m512 shift = _mm512_set1_ps(12582912);
    __m512 whole = _mm512_add_ps(x, shift), f = _mm512_sub_ps(x, _mm512_sub_ps(whole, shift));
    __m512 y = _mm512_set1_ps(9.570100592e-3f);
    for (float c : {5.591786022e-2f, 2.402474486e-1f, 6.931218148e-1f, 9.999992614e-1f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);  // and NaN
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(seen, _mm512_castps_si512(y), exponent));
}

// 16 x 16 numbers of 32 bits, rows for columns: in stage `bit` this bit of row and column change places.
template <int bit>
inline void exchange(__m512i* rows) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 upper = bit == 1 ? 0xaaaa : bit == 2 ? 0xcccc : bit == 4 ? 0xf0f0 : 0xff00;  // lanes with the bit
    // numbers from 16 on are those of the second of two rows
    const __m512i first = _mm512_mask_add_epi32(lanes, upper, lanes, _mm512_set1_epi32(SIDE - bit));
    const __m512i second = _mm512_mask_add_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(bit)), upper, lanes, _mm512_set1_epi32(SIDE));
    for (int r = 0; r < SIDE; r++) {
        if (r & bit) continue;
        __m512i a = rows[r], b = rows[r + bit];
        rows[r] = _mm512_permutex2var_epi32(a, first, b);
        rows[r + bit] = _mm512_permutex2var_epi32(a, second, b);
    }
}

inline void transpose(__m512i* rows) {
    exchange<1>(rows);
    exchange<2>(rows);
    exchange<4>(rows);
    exchange<8>(rows);
}

// One head of a tensor (T, E), rows `stride` apart.
struct Head {
    const Half* first;
    int64_t stride;
    int tokens, width;

    // 32 numbers of a row, zeros beyond the head's end.
    __m512i load(int token, int from) const {
        int count = token < tokens ? std::min(DEPTH, width - from) : 0;
        return count <= 0 ? _mm512_setzero_si512()
                          : _mm512_maskz_loadu_epi16(__mmask32(0xffffffffu >> (DEPTH - count)), first + token * stride + from);
    }
};

void store(Half* tile, const __m512i* rows) {
    for (int r = 0; r < SIDE; r++) _mm512_store_si512(tile + r * DEPTH, rows[r]);
}

// X (t, e): a left operand, summed over the width.
void pack_rows(const Head& x, Tiles to, int t, bool turned) {
    for (int e = 0; e < to.across; e++) {
        __m512i rows[SIDE];
        for (int r = 0; r < SIDE; r++) rows[r] = x.load(t * SIDE + r, e * DEPTH);
        if (turned) transpose(rows);  // X^T, a right operand
        store(to(t, e), rows);
    }
}

// X (e, s): a right operand, summed over tokens.
void pack_pairs(const Head& x, Tiles to, int s, bool turned) {
    for (int e = 0; e * SIDE < x.width; e++) {
        __m512i rows[SIDE];
        for (int p = 0; p < SIDE; p++) {
            __m512i even = x.load(s * DEPTH + 2 * p, e * SIDE), odd = x.load(s * DEPTH + 2 * p + 1, e * SIDE);
            __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(even));
            rows[p] = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(odd)), 16));
        }
        if (turned) transpose(rows);  // X^T, a left operand
        store(to(e, s), rows);
    }
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Work memory of a thread, handed out in order.
struct Memory {
    std::unique_ptr<char, Free> whole;
    char* next;
    explicit Memory(size_t bytes) : whole((char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64)), next(whole.get()) {}
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

struct Sizes {
    int tokens, width, t, s, e, wide;  // t, s: tiles of 16 and 32 tokens; e: tiles of 16, wide: of 32 numbers of a head
    float scale, base2;                // of scores, and of their powers of two
    Sizes(int tokens, int width)
        : tokens(tokens), width(width), t((tokens + 31) / 32 * 2), s(t / 2), e(width / 16), wide((width + 31) / 32),
          scale(1 / std::sqrt(float(width))), base2(scale * float(M_LOG2E)) {}
};

constexpr float HIDDEN = -INFINITY;

// Of a row of scores, keys `key` and queries from `query` on: what a query may not see.
inline __mmask16 hidden(int key, int query) {
    int first = key - query;  // the first lane that sees it
    return first <= 0 ? 0 : first >= SIDE ? 0xffff : __mmask16((1 << first) - 1);
}

}  // namespace

extern "C" {

// (B, H, T, E) or (B, K, T, E) in bfloat16, numbers apart; a row's numbers lie side by side.
struct Tensor {
    Half* first;
    int64_t batch, head, token;
};
}

namespace {

Head head_of(const Tensor& x, int b, int h, const Sizes& n) {
    return {x.first + b * x.batch + h * x.head, x.token, n.tokens, n.width};
}

// X of its transpose's tiles (e, t), each column times its factor.
void write_turned(Sums from, int t, __m512 factors, const Tensor& x, int b, int h, const Sizes& n) {
    Half* to = x.first + b * x.batch + h * x.head;
    for (int e = 0; e < n.e; e++) {
        __m512i rows[SIDE];
        for (int r = 0; r < SIDE; r++)
            rows[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(from(e, t) + r * SIDE), factors));
        transpose(rows);
        for (int r = 0; r < SIDE && t * SIDE + r < n.tokens; r++)
            _mm256_storeu_si256((__m256i*)(to + (t * SIDE + r) * x.token + e * SIDE), shortened(_mm512_castsi512_ps(rows[r])));
    }
}

// X of its tiles (t, e), times a factor.
void write_rows(Sums from, int t, float factor, const Tensor& x, int b, int h, const Sizes& n) {
    Half* to = x.first + b * x.batch + h * x.head;
    for (int e = 0; e < n.e; e++)
        for (int r = 0; r < SIDE && t * SIDE + r < n.tokens; r++) {
            __m512 row = _mm512_mul_ps(_mm512_load_ps(from(t, e) + r * SIDE), _mm512_set1_ps(factor));
            _mm256_storeu_si256((__m256i*)(to + (t * SIDE + r) * x.token + e * SIDE), shortened(row));
        }
}

// Forward pass of one head. Scores of 32 queries and a block of keys at a time, with the running maximum m and sum l.
struct Forward {
    Sizes n;
    Memory memory;
    Tiles keys, values, query, weights;
    Sums scores, out;

    explicit Forward(const Sizes& n)
        : n(n), memory(size_t(1024) * (n.t * n.wide + n.e * n.s + 2 * n.wide + 2 * BLOCK + 4 * BLOCK + 2 * n.e)),
          keys(memory.take<Half>(n.t, n.wide)), values(memory.take<Half>(n.e, n.s)), query(memory.take<Half>(2, n.wide)),
          weights(memory.take<Half>(2, BLOCK)), scores(memory.take<float>(2 * BLOCK, 2)), out(memory.take<float>(n.e, 2)) {}

    void load(const Head& k, const Head& v) {
        for (int t = 0; t < n.t; t++) pack_rows(k, keys, t, false);
        for (int s = 0; s < n.s; s++) pack_pairs(v, values, s, true);
    }

    // The softmax of queries `q` (0 or 1 of the two tiles) over the keys of a block, and what it does to the rest.
    void soften(int q, Range block, int s, __m512& peak, __m512& total) {
        int count = 2 * (block.to - block.from), query = (2 * s + q) * SIDE;
        __m512 base2 = _mm512_set1_ps(n.base2), old = peak;
        for (int t = 2 * (s - block.from); t < count; t++)  // the last two tiles of keys
            for (int r = 0; r < SIDE; r++) {
                float* at = scores(t, q) + r * SIDE;
                _mm512_mask_store_ps(at, hidden((2 * block.from + t) * SIDE + r, query), _mm512_set1_ps(HIDDEN));
            }
        __m512 highest[4] = {_mm512_set1_ps(HIDDEN), _mm512_set1_ps(HIDDEN), _mm512_set1_ps(HIDDEN), _mm512_set1_ps(HIDDEN)};
        for (int t = 0; t < count; t++)
            for (int r = 0; r < SIDE; r++)
                highest[r % 4] = _mm512_max_ps(highest[r % 4], _mm512_load_ps(scores(t, q) + r * SIDE));
        for (__m512 x : highest) peak = _mm512_max_ps(peak, _mm512_mul_ps(x, base2));
        __m512 kept = power_of_two(_mm512_sub_ps(old, peak));
        total = _mm512_mul_ps(total, kept);
        for (int e = 0; e < n.e; e++)
            for (int r = 0; r < SIDE; r++) {
                float* at = out(e, q) + r * SIDE;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), kept));
            }
        for (int t = 0; t < count; t++)
            for (int r = 0; r < SIDE; r += 2) {
                const float* at = scores(t, q) + r * SIDE;
                __m512 even = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(at), base2, peak));
                __m512 odd = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(at + SIDE), base2, peak));
                total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
                _mm512_store_si512(weights(q, t / 2) + (t % 2 * SIDE + r) * SIDE, paired(even, odd));
            }
    }

    // O and log2 of the sum of 2^scores.
    void run(const Head& q, const Tensor& o, float* log_sums, int b, int h) {
        for (int s = 0; s < n.s; s++) {
            Tiles turned = {query.first - 2 * s * query.row(), n.wide};
            for (int t = 2 * s; t < 2 * s + 2; t++) pack_rows(q, turned, t, true);
            std::memset(out.first, 0, size_t(n.e) * 2 * 1024);
            __m512 peak[2], total[2];
            for (int i = 0; i < 2; i++) peak[i] = _mm512_set1_ps(-1e30f), total[i] = _mm512_setzero_ps();
            for (int from = 0; from <= s; from += BLOCK) {
                Range block = {from, std::min(from + BLOCK, s + 1)};
                Tiles these = {keys(2 * from, 0), n.wide};
                product(true, scores, {0, 2 * (block.to - from)}, {0, 2}, these, query, {0, n.wide});
                for (int i = 0; i < 2; i++) soften(i, block, s, peak[i], total[i]);
                Tiles across = {values(0, from), n.s};
                product(false, out, {0, n.e}, {0, 2}, across, weights, {0, block.to - from});
            }
            for (int i = 0; i < 2; i++) {
                alignas(64) float sums[SIDE], peaks[SIDE];
                _mm512_store_ps(sums, total[i]), _mm512_store_ps(peaks, peak[i]);
                int first = (2 * s + i) * SIDE;
                for (int r = 0; r < SIDE && first + r < n.tokens; r++) log_sums[first + r] = peaks[r] + std::log2(sums[r]);
                Sums column = {out.first - 2 * s * FLOATS, 2};
                write_turned(column, 2 * s + i, _mm512_div_ps(_mm512_set1_ps(1), total[i]), o, b, h, n);
            }
        }
    }
};

// Backward pass of the heads that share keys and values, a block of keys against a block of queries at a time:
// P = 2^(S - log Z), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dK = dS^T Q, dQ = dS K, scaled at the end.
struct Backward {
    Sizes n;
    Memory memory;
    Tiles key_rows, keys_turned, value_rows, queries, query_pairs, grads, grad_pairs;
    Tiles weights, errors, error_pairs;
    Sums score, error, key_sums, value_sums, query_sums;
    float *log_sums, *shares;

    explicit Backward(const Sizes& n)
        : n(n), memory(size_t(1024) * (4 * n.t * n.wide + 3 * n.e * n.s + 6 * BLOCK * BLOCK + 8 + 3 * n.t * n.e) + 128 * n.t),
          key_rows(memory.take<Half>(n.t, n.wide)), keys_turned(memory.take<Half>(n.e, n.s)),
          value_rows(memory.take<Half>(n.t, n.wide)), queries(memory.take<Half>(n.t, n.wide)),
          query_pairs(memory.take<Half>(n.e, n.s)), grads(memory.take<Half>(n.t, n.wide)),
          grad_pairs(memory.take<Half>(n.e, n.s)), weights(memory.take<Half>(2 * BLOCK, BLOCK)),
          errors(memory.take<Half>(2 * BLOCK, BLOCK)), error_pairs(memory.take<Half>(2 * BLOCK, BLOCK)),
          score(memory.take<float>(2, 2)), error(memory.take<float>(2, 2)), key_sums(memory.take<float>(n.t, n.e)),
          value_sums(memory.take<float>(n.t, n.e)), query_sums(memory.take<float>(n.e, n.t)),
          log_sums(memory.floats(n.t * SIDE)), shares(memory.floats(n.t * SIDE)) {}

    void load(const Head& k, const Head& v) {
        for (int t = 0; t < n.t; t++) pack_rows(k, key_rows, t, false), pack_rows(v, value_rows, t, false);
        for (int s = 0; s < n.s; s++) pack_pairs(k, keys_turned, s, true);
        std::memset(key_sums.first, 0, size_t(n.t) * n.e * 1024);
        std::memset(value_sums.first, 0, size_t(n.t) * n.e * 1024);
    }

    void load_queries(const Head& q, const Head& o, const Head& grad, const float* logs) {
        for (int t = 0; t < n.t; t++) pack_rows(q, queries, t, true), pack_rows(grad, grads, t, true);
        for (int s = 0; s < n.s; s++) pack_pairs(q, query_pairs, s, false), pack_pairs(grad, grad_pairs, s, false);
        std::memset(query_sums.first, 0, size_t(n.t) * n.e * 1024);
        for (int i = 0; i < n.t * SIDE; i++) {
            log_sums[i] = i < n.tokens ? logs[i] : INFINITY;  // no weight for padding
            __m512 dot = _mm512_setzero_ps();
            for (int e = 0; e < n.e && i < n.tokens; e++) {
                __m512 left = widened(_mm256_loadu_si256((const __m256i*)(o.first + i * o.stride + e * SIDE)));
                dot = _mm512_fmadd_ps(left, widened(_mm256_loadu_si256((const __m256i*)(grad.first + i * grad.stride + e * SIDE))), dot);
            }
            shares[i] = _mm512_reduce_add_ps(dot);
        }
    }

    // P^T and dS^T of 32 keys and 32 queries, which have their place (k, q) in the block.
    void soften(int keys, int queries, int k, int q) {
        __m512 base2 = _mm512_set1_ps(n.base2);
        for (int j = 0; j < 2; j++) {
            int query = queries * DEPTH + j * SIDE;
            __m512 logs = _mm512_load_ps(log_sums + query), share = _mm512_load_ps(shares + query);
            for (int i = 0; i < 2; i++)
                for (int r = 0; r < SIDE; r += 2) {
                    __m512 both[2];
                    for (int next = 0; next < 2; next++) {
                        int row = r + next;
                        __m512 p = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(score(i, j) + row * SIDE), base2, logs));
                        if (keys == queries)
                            p = _mm512_mask_mov_ps(p, hidden(i * SIDE + row, j * SIDE), _mm512_setzero_ps());
                        both[next] = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(error(i, j) + row * SIDE), share));
                        int at = row * DEPTH + j * SIDE;
                        _mm256_store_si256((__m256i*)(weights(2 * k + i, q) + at), shortened(p));
                        _mm256_store_si256((__m256i*)(errors(2 * k + i, q) + at), shortened(both[next]));
                    }
                    _mm512_store_si512(error_pairs(2 * q + j, k) + (i * SIDE + r) * SIDE, paired(both[0], both[1]));
                }
        }
    }

    void block(Range keys, Range queries) {
        bool diagonal = keys.from == queries.from;
        for (int k = keys.from; k < keys.to; k++)
            for (int q = diagonal ? k : queries.from; q < queries.to; q++) {
                Tiles left = {key_rows(2 * k, 0), n.wide}, right = {this->queries(2 * q, 0), n.wide};
                product(true, score, {0, 2}, {0, 2}, left, right, {0, n.wide});
                left.first = value_rows(2 * k, 0), right.first = grads(2 * q, 0);
                product(true, error, {0, 2}, {0, 2}, left, right, {0, n.wide});
                soften(k, q, k - keys.from, q - queries.from);
            }
        int count = keys.to - keys.from, across = queries.to - queries.from;
        Tiles these_grads = {grad_pairs(0, queries.from), n.s}, these_queries = {query_pairs(0, queries.from), n.s};
        for (int k = 0; k < count; k++) {  // of the diagonal, what a query may see alone
            Range rows = {2 * k, 2 * k + 2}, seen = {diagonal ? k : 0, across};
            Sums to_values = {value_sums(2 * keys.from, 0), n.e}, to_keys = {key_sums(2 * keys.from, 0), n.e};
            product(false, to_values, rows, {0, n.e}, weights, these_grads, seen);
            product(false, to_keys, rows, {0, n.e}, errors, these_queries, seen);
        }
        Tiles these_keys = {keys_turned(0, keys.from), n.s};
        Sums to_queries = {query_sums(0, 2 * queries.from), n.t};
        for (int q = 0; q < across; q++)
            product(false, to_queries, {0, n.e}, {2 * q, 2 * q + 2}, these_keys, error_pairs, {0, diagonal ? q + 1 : count});
    }

    void run() {
        for (int k = 0; k < n.s; k += BLOCK)
            for (int q = k; q < n.s; q += BLOCK) block({k, std::min(k + BLOCK, n.s)}, {q, std::min(q + BLOCK, n.s)});
    }
};

}  // namespace

extern "C" {

// Ask Linux for the tile registers, once a process. Returns whether the kernels can run.
int32_t minillama_attention_ready() {
#ifdef __AMX_BF16__
    return has_tiles();
#else
    return 1;
#endif
}

// O = softmax(Q K^T / sqrt(E)) V, causal, and log2 of the softmax's denominators in `log_sums` (B, H, T).
void minillama_attention(int32_t batch, int32_t heads, int32_t kv_heads, int32_t tokens, int32_t width, int32_t threads,
                         const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* o, float* log_sums) {
    Sizes n(tokens, width);
    int group = heads / kv_heads;
#pragma omp parallel num_threads(threads)
    {
        TileUnit unit;
        Forward pass(n);
#pragma omp for schedule(dynamic)
        for (int i = 0; i < batch * kv_heads; i++) {
            int b = i / kv_heads, shared = i % kv_heads;
            pass.load(head_of(*k, b, shared, n), head_of(*v, b, shared, n));
            for (int h = shared * group; h < (shared + 1) * group; h++)
                pass.run(head_of(*q, b, h, n), *o, log_sums + (size_t(b) * heads + h) * tokens, b, h);
        }
    }
}

// Gradients of the same with respect to Q, K and V, of `grad`, that with respect to O.
void minillama_attention_backward(int32_t batch, int32_t heads, int32_t kv_heads, int32_t tokens, int32_t width, int32_t threads,
                                  const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* o, const float* log_sums,
                                  const Tensor* grad, const Tensor* grad_q, const Tensor* grad_k, const Tensor* grad_v) {
    Sizes n(tokens, width);
    int group = heads / kv_heads;
#pragma omp parallel num_threads(threads)
    {
        TileUnit unit;
        Backward pass(n);
#pragma omp for schedule(dynamic)
        for (int i = 0; i < batch * kv_heads; i++) {
            int b = i / kv_heads, shared = i % kv_heads;
            pass.load(head_of(*k, b, shared, n), head_of(*v, b, shared, n));
            for (int h = shared * group; h < (shared + 1) * group; h++) {
                const float* logs = log_sums + (size_t(b) * heads + h) * tokens;
                pass.load_queries(head_of(*q, b, h, n), head_of(*o, b, h, n), head_of(*grad, b, h, n), logs);
                pass.run();
                for (int t = 0; t < n.t; t++) write_turned(pass.query_sums, t, _mm512_set1_ps(n.scale), *grad_q, b, h, n);
            }
            for (int t = 0; t < n.t; t++) {
                write_rows(pass.key_sums, t, n.scale, *grad_k, b, shared, n);
                write_rows(pass.value_sums, t, 1, *grad_v, b, shared, n);
            }
        }
    }
}
}
