// Causal FlashAttention in bfloat16, forward and backward, without materialized attention weights (Dao et al. 2022,
// arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691). Compiled by build.py, called by attention.py.
//
// Queries are columns everywhere: transposed scores S^T (keys, queries) have the queries of a tile in the lanes of a
// vector, so that the softmax needs no sum across lanes, S^T is the left operand of dV = P^T dO and dK = dS^T Q as it is,
// and two of its rows interleaved are the right operand of O^T = V^T P^T and dQ^T = K^T dS^T.
//
// T tokens, E head width. Index t counts tiles of 16 tokens, s tiles of 32; matrix products are those of gemm_bf16.h.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "gemm_bf16.h"

namespace {

constexpr int BLOCK = 4;  // keys and queries per block, in units of DEPTH: intermediates stay in the L2 cache

struct Sizes {
    int tokens, width, t, s, e, wide;  // t, s: tiles of 16 and 32 tokens; e, wide: tiles of 16 and 32 of the head width
    float scale, base2;                // of scores, and the same for base-2 exponentials
    Sizes(int tokens, int width)
        : tokens(tokens), width(width), t((tokens + 31) / 32 * 2), s(t / 2), e(width / 16), wide((width + 31) / 32),
          scale(1 / std::sqrt(float(width))), base2(scale * float(M_LOG2E)) {}
};

constexpr float MASKED = -INFINITY;

// Causal mask of a row of scores, key `key` and queries from `query` on: the masked lanes.
inline __mmask16 masked(int key, int query) {
    int first = key - query;  // the first lane that attends to it
    return first <= 0 ? 0 : first >= SIDE ? 0xffff : __mmask16((1 << first) - 1);
}

Rows rows_of(const Tensor& x, int b, int h, const Sizes& n) {
    return {head_of<Half>(x, b, h), x.token, n.tokens, n.width};
}

// Write 16 tokens of X from column `column` of the tiles (e, t) of X^T, each token times its factor.
void write_transposed(Sums from, int column, __m512 factors, const Tensor& x, int b, int h, int t, const Sizes& n) {
    Half* to = head_of<Half>(x, b, h);
    for (int e = 0; e < n.e; e++) {
        Row rows[SIDE];
        for (int r = 0; r < SIDE; r++)
            rows[r] = (Row)_mm512_mul_ps(_mm512_load_ps(from(e, column) + r * SIDE), factors);
        transpose(rows);
        for (int r = 0; r < SIDE && t * SIDE + r < n.tokens; r++)
            _mm256_storeu_si256((__m256i*)(to + (t * SIDE + r) * x.token + e * SIDE), f32_to_bf16((__m512)rows[r]));
    }
}

// Write 16 tokens of X from its tiles (t, e), times a factor.
void write_rows(Sums from, int t, float factor, const Tensor& x, int b, int h, const Sizes& n) {
    Half* to = head_of<Half>(x, b, h);
    for (int e = 0; e < n.e; e++)
        for (int r = 0; r < SIDE && t * SIDE + r < n.tokens; r++) {
            __m512 row = _mm512_mul_ps(_mm512_load_ps(from(t, e) + r * SIDE), _mm512_set1_ps(factor));
            _mm256_storeu_si256((__m256i*)(to + (t * SIDE + r) * x.token + e * SIDE), f32_to_bf16(row));
        }
}

// Forward pass of one head, 32 queries and a block of keys at a time: online softmax with running maximum m and sum l.
struct Forward {
    TileUnit unit;
    Sizes n;
    Memory memory;
    Tiles keys, values, query, weights;
    Sums scores, out;

    static size_t bytes(const Sizes& n) {
        return size_t(1024) * (n.t * n.wide + n.e * n.s + 2 * n.wide + 2 * BLOCK + 4 * BLOCK + 2 * n.e);
    }

    Forward(const Sizes& n, char* all)
        : n(n), memory{all},
          keys(memory.take<Half>(n.t, n.wide)), values(memory.take<Half>(n.e, n.s)), query(memory.take<Half>(2, n.wide)),
          weights(memory.take<Half>(2, BLOCK)), scores(memory.take<float>(2 * BLOCK, 2)), out(memory.take<float>(n.e, 2)) {}

    void load_keys(const Tensor& keys_from, const Tensor& values_from, int b, int h) {
        Rows k = rows_of(keys_from, b, h, n), v = rows_of(values_from, b, h, n);
        for (int t = 0; t < n.t; t++) pack_rows(k, t, keys, t, false);
        for (int s = 0; s < n.s; s++) pack_pairs(v, s, values, true);
    }

    // Online softmax of query tile `q` (0 or 1) over a block of keys, with rescaling of previous outputs and sums.
    void softmax(int q, Range block, int s, __m512& peak, __m512& total) {
        int count = 2 * (block.to - block.from), query = (2 * s + q) * SIDE;
        __m512 base2 = _mm512_set1_ps(n.base2), old = peak;
        for (int t = 2 * (s - block.from); t < count; t++)  // the last two tiles of keys
            for (int r = 0; r < SIDE; r++) {
                float* at = scores(t, q) + r * SIDE;
                _mm512_mask_store_ps(at, masked((2 * block.from + t) * SIDE + r, query), _mm512_set1_ps(MASKED));
            }
        __m512 highest[4] = {_mm512_set1_ps(MASKED), _mm512_set1_ps(MASKED), _mm512_set1_ps(MASKED), _mm512_set1_ps(MASKED)};
        for (int t = 0; t < count; t++)
            for (int r = 0; r < SIDE; r++)
                highest[r % 4] = _mm512_max_ps(highest[r % 4], _mm512_load_ps(scores(t, q) + r * SIDE));
        for (__m512 x : highest) peak = _mm512_max_ps(peak, _mm512_mul_ps(x, base2));
        __m512 rescale = fast_exp2(_mm512_sub_ps(old, peak));
        total = _mm512_mul_ps(total, rescale);
        for (int e = 0; e < n.e; e++)
            for (int r = 0; r < SIDE; r++) {
                float* at = out(e, q) + r * SIDE;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), rescale));
            }
        for (int t = 0; t < count; t++)
            for (int r = 0; r < SIDE; r += 2) {
                const float* at = scores(t, q) + r * SIDE;
                __m512 even = fast_exp2(_mm512_fmsub_ps(_mm512_load_ps(at), base2, peak));
                __m512 odd = fast_exp2(_mm512_fmsub_ps(_mm512_load_ps(at + SIDE), base2, peak));
                total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
                _mm512_store_si512(weights(q, t / 2) + (t % 2 * SIDE + r) * SIDE, paired(even, odd));
            }
    }

    // O and log2 of the softmax normalizers.
    void run(const Tensor& queries_from, const Tensor& o, float* log_sums, int b, int h) {
        Rows q = rows_of(queries_from, b, h, n);
        for (int s = 0; s < n.s; s++) {
            for (int i = 0; i < 2; i++) pack_rows(q, 2 * s + i, query, i, true);
            std::memset(out.first, 0, size_t(n.e) * 2 * 1024);
            __m512 peak[2], total[2];
            for (int i = 0; i < 2; i++) peak[i] = _mm512_set1_ps(-1e30f), total[i] = _mm512_setzero_ps();
            for (int from = 0; from <= s; from += BLOCK) {
                Range block = {from, std::min(from + BLOCK, s + 1)};
                Tiles these = {keys(2 * from, 0), n.wide};
                product(true, scores, {0, 2 * (block.to - from)}, {0, 2}, these, query, {0, n.wide});
                for (int i = 0; i < 2; i++) softmax(i, block, s, peak[i], total[i]);
                Tiles across = {values(0, from), n.s};
                product(false, out, {0, n.e}, {0, 2}, across, weights, {0, block.to - from});
            }
            for (int i = 0; i < 2; i++) {
                alignas(64) float sums[SIDE], peaks[SIDE];
                _mm512_store_ps(sums, total[i]), _mm512_store_ps(peaks, peak[i]);
                int first = (2 * s + i) * SIDE;
                for (int r = 0; r < SIDE && first + r < n.tokens; r++) log_sums[first + r] = peaks[r] + std::log2(sums[r]);
                write_transposed(out, i, _mm512_div_ps(_mm512_set1_ps(1), total[i]), o, b, h, 2 * s + i, n);
            }
        }
    }
};

// Backward pass of the query heads of one key/value head, a block of keys against a block of queries at a time:
// P = 2^(S - log Z), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dK = dS^T Q, dQ = dS K, scaled at the end.
struct Backward {
    TileUnit unit;
    Sizes n;
    Memory memory;
    Tiles key_rows, keys_transposed, value_rows, queries, query_pairs, grads, grad_pairs;
    Tiles weights, errors, error_pairs;
    Sums score, error, key_sums, value_sums, query_sums;
    float *log_sums, *deltas;

    static size_t bytes(const Sizes& n) {
        return size_t(1024) * (4 * n.t * n.wide + 3 * n.e * n.s + 6 * BLOCK * BLOCK + 8 + 3 * n.t * n.e) + 128 * n.t;
    }

    Backward(const Sizes& n, char* all)
        : n(n), memory{all},
          key_rows(memory.take<Half>(n.t, n.wide)), keys_transposed(memory.take<Half>(n.e, n.s)),
          value_rows(memory.take<Half>(n.t, n.wide)), queries(memory.take<Half>(n.t, n.wide)),
          query_pairs(memory.take<Half>(n.e, n.s)), grads(memory.take<Half>(n.t, n.wide)),
          grad_pairs(memory.take<Half>(n.e, n.s)), weights(memory.take<Half>(2 * BLOCK, BLOCK)),
          errors(memory.take<Half>(2 * BLOCK, BLOCK)), error_pairs(memory.take<Half>(2 * BLOCK, BLOCK)),
          score(memory.take<float>(2, 2)), error(memory.take<float>(2, 2)), key_sums(memory.take<float>(n.t, n.e)),
          value_sums(memory.take<float>(n.t, n.e)), query_sums(memory.take<float>(n.e, n.t)),
          log_sums(memory.floats(n.t * SIDE)), deltas(memory.floats(n.t * SIDE)) {}

    void load_keys(const Tensor& keys_from, const Tensor& values_from, int b, int h) {
        Rows k = rows_of(keys_from, b, h, n), v = rows_of(values_from, b, h, n);
        for (int t = 0; t < n.t; t++) pack_rows(k, t, key_rows, t, false), pack_rows(v, t, value_rows, t, false);
        for (int s = 0; s < n.s; s++) pack_pairs(k, s, keys_transposed, true);
        std::memset(key_sums.first, 0, size_t(n.t) * n.e * 1024);
        std::memset(value_sums.first, 0, size_t(n.t) * n.e * 1024);
    }

    void load_queries(const Tensor& queries_from, const Tensor& o_from, const Tensor& grad_from, const float* logs, int b, int h) {
        Rows q = rows_of(queries_from, b, h, n), o = rows_of(o_from, b, h, n), grad = rows_of(grad_from, b, h, n);
        for (int t = 0; t < n.t; t++) pack_rows(q, t, queries, t, true), pack_rows(grad, t, grads, t, true);
        for (int s = 0; s < n.s; s++) pack_pairs(q, s, query_pairs, false), pack_pairs(grad, s, grad_pairs, false);
        std::memset(query_sums.first, 0, size_t(n.t) * n.e * 1024);
        for (int i = 0; i < n.t * SIDE; i++) {
            log_sums[i] = i < n.tokens ? logs[i] : INFINITY;  // zero weight for padding
            __m512 dot = _mm512_setzero_ps();
            for (int e = 0; e < n.e && i < n.tokens; e++) {
                __m512 left = bf16_to_f32(_mm256_loadu_si256((const __m256i*)(o.first + i * o.stride + e * SIDE)));
                dot = _mm512_fmadd_ps(left, bf16_to_f32(_mm256_loadu_si256((const __m256i*)(grad.first + i * grad.stride + e * SIDE))), dot);
            }
            deltas[i] = _mm512_reduce_add_ps(dot);
        }
    }

    // P^T and dS^T of 32 keys and 32 queries, at tile (k, q) of the block.
    void softmax_grad(int keys, int queries, int k, int q) {
        __m512 base2 = _mm512_set1_ps(n.base2);
        for (int j = 0; j < 2; j++) {
            int query = queries * DEPTH + j * SIDE;
            __m512 logs = _mm512_load_ps(log_sums + query), delta = _mm512_load_ps(deltas + query);
            for (int i = 0; i < 2; i++)
                for (int r = 0; r < SIDE; r += 2) {
                    __m512 both[2];
                    for (int next = 0; next < 2; next++) {
                        int row = r + next;
                        __m512 p = fast_exp2(_mm512_fmsub_ps(_mm512_load_ps(score(i, j) + row * SIDE), base2, logs));
                        if (keys == queries)
                            p = _mm512_mask_mov_ps(p, masked(i * SIDE + row, j * SIDE), _mm512_setzero_ps());
                        both[next] = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(error(i, j) + row * SIDE), delta));
                        int at = row * DEPTH + j * SIDE;
                        _mm256_store_si256((__m256i*)(weights(2 * k + i, q) + at), f32_to_bf16(p));
                        _mm256_store_si256((__m256i*)(errors(2 * k + i, q) + at), f32_to_bf16(both[next]));
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
                softmax_grad(k, q, k - keys.from, q - queries.from);
            }
        int count = keys.to - keys.from, across = queries.to - queries.from;
        Tiles these_grads = {grad_pairs(0, queries.from), n.s}, these_queries = {query_pairs(0, queries.from), n.s};
        for (int k = 0; k < count; k++) {  // on the diagonal, unmasked tiles only
            Range rows = {2 * k, 2 * k + 2}, unmasked = {diagonal ? k : 0, across};
            Sums to_values = {value_sums(2 * keys.from, 0), n.e}, to_keys = {key_sums(2 * keys.from, 0), n.e};
            product(false, to_values, rows, {0, n.e}, weights, these_grads, unmasked);
            product(false, to_keys, rows, {0, n.e}, errors, these_queries, unmasked);
        }
        Tiles these_keys = {keys_transposed(0, keys.from), n.s};
        Sums to_queries = {query_sums(0, 2 * queries.from), n.t};
        for (int q = 0; q < across; q++)
            product(false, to_queries, {0, n.e}, {2 * q, 2 * q + 2}, these_keys, error_pairs, {0, diagonal ? q + 1 : count});
    }

    void run() {
        for (int k = 0; k < n.s; k += BLOCK)
            for (int q = k; q < n.s; q += BLOCK) block({k, std::min(k + BLOCK, n.s)}, {q, std::min(q + BLOCK, n.s)});
    }

    void write_queries(const Tensor& grad_q, int b, int h) const {
        for (int t = 0; t < n.t; t++) write_transposed(query_sums, t, _mm512_set1_ps(n.scale), grad_q, b, h, t, n);
    }

    void write_keys(const Tensor& grad_k, const Tensor& grad_v, int b, int h) const {
        for (int t = 0; t < n.t; t++) {
            write_rows(key_sums, t, n.scale, grad_k, b, h, n);
            write_rows(value_sums, t, 1, grad_v, b, h, n);
        }
    }
};

}  // namespace

extern "C" {

// Request the AMX tile registers from Linux, once per process. Returns whether the kernels can run.
int32_t minillama_ready() {
#ifdef __AMX_BF16__
    return has_tiles();
#else
    return 1;
#endif
}
}

#include "attention_entry.h"
