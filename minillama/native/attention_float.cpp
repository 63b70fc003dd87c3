// Causal FlashAttention in float32, forward and backward, without materialized attention weights (Dao et al. 2022,
// arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691). Compiled by build.py, called by attention.py.
//
// Scores are kept transposed, S^T (keys, queries): queries are the lanes of a vector, so that the softmax needs no sum
// across lanes. Of a matrix product C += A B the columns of B and C are lanes, and numbers of A are broadcast, so that A
// may be read along either axis: P^T is the left operand of O = P V and of dV = P^T dO as it is, dS^T that of dQ = dS K
// and of dK = dS^T Q. Only Q and dO are transposed, for S^T = K Q^T and dP^T = V dO^T.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "simd.h"

namespace {

constexpr int BLOCK = 64;                       // queries and keys per block: intermediates stay in the cache
constexpr int ROWS = REGISTERS == 32 ? 12 : 6;  // of a register tile: 2 ROWS sums, two vectors of B, one number of A
constexpr int PANEL = 2 * WIDTH;                // columns of a register tile
constexpr int AHEAD = 16;                       // tokens from one that is read to the one that is fetched
constexpr float MASKED = -INFINITY;

typedef Floats<8>::type Eight;  // heads are copied in units of 8, the divisor of their width

constexpr int rounded(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Row-major matrix.
struct Matrix {
    float* first;
    long stride;
    Matrix from(int row, int column) const { return {first + row * stride + column, stride}; }
};

struct Sizes {
    int tokens, width, padded, columns;  // tokens and width of a head, and in memory
    float scale, base2;                  // of scores, and the same for base-2 exponentials
    Sizes(int tokens, int width)
        : tokens(tokens), width(width), padded(rounded(tokens, std::max(PANEL, 8))),
          columns(rounded(width, std::max(WIDTH, 8))), scale(1 / std::sqrt(float(width))), base2(scale * float(M_LOG2E)) {}
    Matrix from(float* head, int token) const { return {head + size_t(token) * columns, columns}; }
    size_t head() const { return size_t(rounded(padded, BLOCK)) * columns; }
};

// Which numbers of A are multiplied: all, or in row m those up to column m, or from it on.
enum Part { ALL, LOWER, UPPER };

// C = or += A B for R rows of C and N vectors of its columns; with `across` A is the transpose of the matrix `a`.
template <int R, int N, bool across>
inline void tile(bool fresh, Matrix c, Matrix a, Matrix b, int depth) {
    const long row = across ? 1 : a.stride, column = across ? a.stride : 1;
    Vector sums[R][N] = {};
    for (int k = 0; k < depth; k++) {
        Vector x[N];
        for (int n = 0; n < N; n++) {
            x[n] = load<Vector>(b.first + n * WIDTH);
            keep(x[n]);
        }
        for (int r = 0; r < R; r++) {
            Vector y = a.first[r * row] - Vector{};
            for (int n = 0; n < N; n++) sums[r][n] += y * x[n];
        }
        a.first += column, b.first += b.stride;
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float* at = c.first + r * c.stride + n * WIDTH;
            store(at, fresh ? sums[r][n] : load<Vector>(at) + sums[r][n]);
        }
}

// Not inlined: in a larger function GCC keeps addresses of the innermost loop in memory.
template <int N, bool across>
__attribute__((noinline)) void panel(bool fresh, Matrix c, Matrix a, Matrix b, int rows, int depth, Part part) {
    int row = 0;
    auto some = [&](auto count) {
        constexpr int R = decltype(count)::value;
        int begin = part == UPPER ? row : 0, end = part == LOWER ? std::min(row + R, depth) : depth;
        Matrix left = across ? a.from(begin, row) : a.from(row, begin);
        tile<R, N, across>(fresh, c.from(row, 0), left, b.from(begin, 0), end - begin);
        row += R;
    };
    while (rows - row >= ROWS && rows - row != 8) some(std::integral_constant<int, ROWS>());
    while (row < rows) some(std::integral_constant<int, 4>());
}

// C = or += A B for a multiple of 8 rows, and of WIDTH columns.
template <bool across>
inline void product(bool fresh, Matrix c, Matrix a, Matrix b, int rows, int columns, int depth, Part part = ALL) {
    int n = 0;
    for (; n + PANEL <= columns; n += PANEL) panel<2, across>(fresh, c.from(0, n), a, b.from(0, n), rows, depth, part);
    if (n < columns) panel<1, across>(fresh, c.from(0, n), a, b.from(0, n), rows, depth, part);
}

// Copies of a head's tokens with zeros behind them and behind their width.
void pack(const Tensor& x, int b, int h, float* to, const Sizes& n) {
    const float* from = head_of<float>(x, b, h);
    if (n.columns > n.width) std::memset(to, 0, n.head() * sizeof(float));
    for (int t = 0; t < n.tokens; t++)
        for (int e = 0; e < n.width; e += 8) {
            __builtin_prefetch(from + (t + AHEAD) * x.token + e);
            store(to + size_t(t) * n.columns + e, load<Eight>(from + t * x.token + e));
        }
    std::memset(to + size_t(n.tokens) * n.columns, 0, size_t(n.padded - n.tokens) * n.columns * sizeof(float));
}

void unpack(const float* from, float factor, const Tensor& x, int b, int h, const Sizes& n) {
    for (int t = 0; t < n.tokens; t++, from += n.columns) {
        float* to = head_of<float>(x, b, h) + t * x.token;
        for (int e = 0; e < n.width; e += 8) store(to + e, load<Eight>(from + e) * factor);
    }
}

// Rows i and i + D of 8 exchange the halves of every 2 D numbers that lie across the diagonal.
template <int D, int... l>
INLINE void exchange(Eight& x, Eight& y, std::integer_sequence<int, l...>) {
    Eight upper = __builtin_shufflevector(x, y, (l & D ? 8 + l - D : l)...);
    y = __builtin_shufflevector(x, y, (l & D ? 8 + l : l + D)...);
    x = upper;
}

template <int D>
INLINE void exchange_all(Eight (&rows)[8]) {
    for (int i = 0; i < 8; i++)
        if (!(i & D)) exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, 8>());
}

// Transpose of a block of tokens from a packed head, (columns, BLOCK).
void transpose(const float* from, float* to, int tokens, const Sizes& n) {
    for (int t = 0; t < tokens; t += 8)
        for (int e = 0; e < n.width; e += 8) {
            Eight rows[8];
            for (int r = 0; r < 8; r++) rows[r] = load<Eight>(from + size_t(t + r) * n.columns + e);
            exchange_all<4>(rows), exchange_all<2>(rows), exchange_all<1>(rows);
            for (int r = 0; r < 8; r++) store(to + (e + r) * BLOCK + t, rows[r]);
        }
}

// Scores of a key with queries from `query` on, -infinity where the key is later.
INLINE Vector masked(Vector scores, int key, int query) {
    Ints lanes;
    for (int l = 0; l < WIDTH; l++) lanes[l] = l;
    return lanes < key - query ? Vector{} + MASKED : scores;
}

// Forward pass of one head, a block of queries and keys at a time: online softmax with running maximum m and sum l.
struct Forward {
    Sizes n;
    float *keys, *values, *queries, *transposed, *scores, *out;

    static size_t bytes(const Sizes& n) {
        return (3 * n.head() + 2 * size_t(BLOCK) * n.columns + BLOCK * BLOCK) * sizeof(float);
    }

    Forward(const Sizes& n, char* all)
        : n(n), keys((float*)all), values(keys + n.head()), queries(values + n.head()), transposed(queries + n.head()),
          scores(transposed + size_t(BLOCK) * n.columns), out(scores + BLOCK * BLOCK) {}

    // Online softmax of a vector of queries over so many keys, their scores at `at`; on the diagonal keys and queries are
    // the same block, and `query` is the first one's place in it.
    void softmax(float* at, int count, bool diagonal, int query, Vector& peak, Vector& total, float* rescale) {
        const Vector base2 = Vector{} + n.base2;
        for (int k = diagonal ? query : count; k < count; k++) {
            float* scores = at + k * BLOCK;
            store(scores, masked(load<Vector>(scores), k, query));
        }
        Vector highest[4], sums[4] = {}, old = peak;
        for (Vector& x : highest) x = Vector{} + MASKED;
        for (int k = 0; k < count; k += 4)
            for (int i = 0; i < 4; i++) {
                Vector x = load<Vector>(at + (k + i) * BLOCK);
                highest[i] = x > highest[i] ? x : highest[i];
            }
        for (Vector x : highest) x *= base2, peak = x > peak ? x : peak;
        for (int k = 0; k < count; k += 4)
            for (int i = 0; i < 4; i++) {
                Vector p = exp2(load<Vector>(at + (k + i) * BLOCK) * base2 - peak);
                sums[i] += p;
                store(at + (k + i) * BLOCK, p);
            }
        Vector factor = exp2(old - peak);
        store(rescale, factor);
        total = total * factor + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    void load_keys(const Tensor& k, const Tensor& v, int b, int h) { pack(k, b, h, keys, n), pack(v, b, h, values, n); }

    // O and log2 of the softmax normalizers.
    void run(const Tensor& q, const Tensor& o, float* log_sums, int b, int h) {
        pack(q, b, h, queries, n);
        for (int from = 0; from < n.padded; from += BLOCK) block(from, std::min(BLOCK, n.padded - from), log_sums);
        unpack(queries, 1, o, b, h, n);
    }

    void block(int from, int count, float* log_sums) {
        alignas(64) Vector peak[BLOCK / WIDTH], total[BLOCK / WIDTH] = {};
        for (Vector& x : peak) x = Vector{} - 1e30f;
        float* own = n.from(queries, from).first;  // of the queries, and of their outputs when they were read
        transpose(own, transposed, count, n);
        for (int key = 0; key <= from; key += BLOCK) attend(key, count, key == from, peak, total);
        alignas(64) float sums[BLOCK], peaks[BLOCK];
        std::memcpy(sums, total, sizeof sums), std::memcpy(peaks, peak, sizeof peaks);
        for (int i = 0; i < count; i++, own += n.columns) {
            if (from + i < n.tokens) log_sums[from + i] = peaks[i] + std::log2(sums[i]);
            const float *sum = out + i * n.columns, factor = 1 / sums[i];
            for (int e = 0; e < n.columns; e += WIDTH) store(own + e, load<Vector>(sum + e) * factor);
        }
    }

    // Outputs, not normalized, with another block of keys.
    void attend(int key, int count, bool diagonal, Vector* peak, Vector* total) {
        alignas(64) float rescale[BLOCK];
        for (int i = 0; i < count; i += PANEL) {
            int some = diagonal ? i + PANEL : BLOCK;
            product<false>(true, {scores + i, BLOCK}, n.from(keys, key), {transposed + i, BLOCK}, some, PANEL, n.width);
            for (int j = i; j < i + PANEL; j += WIDTH)
                softmax(scores + j, some, diagonal, j, peak[j / WIDTH], total[j / WIDTH], rescale + j);
            for (int k = some; diagonal && k < count; k++) std::memset(scores + k * BLOCK + i, 0, PANEL * sizeof(float));
        }
        for (int i = 0; key && i < count; i++)
            for (int e = 0; e < n.columns; e += WIDTH) {
                float* at = out + i * n.columns + e;
                store(at, load<Vector>(at) * rescale[i]);
            }
        int depth = diagonal ? count : BLOCK;
        Part part = diagonal ? LOWER : ALL;
        product<true>(key == 0, {out, n.columns}, {scores, BLOCK}, n.from(values, key), count, n.columns, depth, part);
    }
};

// Backward pass of the query heads of one key/value head, a block of keys against a block of queries at a time:
// P = 2^(S - log Z), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dK = dS^T Q, dQ = dS K, scaled at the end.
struct Backward {
    Sizes n;
    float *keys, *values, *key_sums, *value_sums, *queries, *grads, *query_sums, *queries_across, *grads_across;
    float *weights, *errors, *log_sums, *deltas;

    static size_t bytes(const Sizes& n) {
        return (9 * n.head() + 2 * BLOCK * BLOCK + 2 * rounded(n.padded, BLOCK)) * sizeof(float);
    }

    Backward(const Sizes& n, char* all)
        : n(n), keys((float*)all), values(keys + n.head()), key_sums(values + n.head()), value_sums(key_sums + n.head()),
          queries(value_sums + n.head()), grads(queries + n.head()), query_sums(grads + n.head()),
          queries_across(query_sums + n.head()), grads_across(queries_across + n.head()), weights(grads_across + n.head()),
          errors(weights + BLOCK * BLOCK), log_sums(errors + BLOCK * BLOCK), deltas(log_sums + rounded(n.padded, BLOCK)) {}

    void load_keys(const Tensor& k, const Tensor& v, int b, int h) {
        pack(k, b, h, keys, n), pack(v, b, h, values, n);
        std::memset(key_sums, 0, n.head() * sizeof(float)), std::memset(value_sums, 0, n.head() * sizeof(float));
    }

    void load_queries(const Tensor& q, const Tensor& o, const Tensor& grad, const float* logs, int b, int h) {
        pack(q, b, h, queries, n), pack(grad, b, h, grads, n);
        for (int from = 0; from < n.padded; from += BLOCK) {
            int count = std::min(BLOCK, n.padded - from);
            transpose(n.from(queries, from).first, n.from(queries_across, from).first, count, n);
            transpose(n.from(grads, from).first, n.from(grads_across, from).first, count, n);
        }
        std::memset(query_sums, 0, n.head() * sizeof(float));
        const float *out = head_of<float>(o, b, h), *errors = head_of<float>(grad, b, h);
        for (int i = 0; i < n.padded; i++) {
            log_sums[i] = i < n.tokens ? logs[i] : INFINITY;  // zero weight for padding
            Eight dot = {};
            for (int e = 0; e < n.width && i < n.tokens; e += 8)
                dot += load<Eight>(out + i * o.token + e) * load<Eight>(errors + i * grad.token + e);
            Four four = fold<8>(dot);
            deltas[i] = (four[0] + four[1]) + (four[2] + four[3]);
        }
    }

    // P^T and dS^T of a panel of queries and the first `count` keys, in place of S^T and dP^T.
    void softmax_grad(int first, int count, int query, bool diagonal) {
        const Vector base2 = Vector{} + n.base2;
        for (int j = query; j < query + PANEL; j += WIDTH) {
            Vector logs = load<Vector>(log_sums + first + j), delta = load<Vector>(deltas + first + j);
            auto key = [&](int k, auto is_masked) LAMBDA {
                float *p = weights + k * BLOCK + j, *s = errors + k * BLOCK + j;
                Vector scores = load<Vector>(p) * base2 - logs;
                Vector x = exp2(is_masked ? masked(scores, k, j) : scores);
                store(p, x);
                store(s, x * (load<Vector>(s) - delta));
            };
            int unmasked = diagonal ? j : count;
            for (int k = 0; k < unmasked; k++) key(k, std::false_type());
            for (int k = unmasked; k < count; k++) key(k, std::true_type());
        }
    }

    void block(int key, int depth, int query, int count) {
        bool diagonal = key == query;
        for (int i = 0; i < count; i += PANEL) {
            int rows = diagonal ? i + PANEL : depth;
            Matrix s = {weights + i, BLOCK}, ds = {errors + i, BLOCK};
            product<false>(true, s, n.from(keys, key), across(queries_across, query, i), rows, PANEL, n.width);
            product<false>(true, ds, n.from(values, key), across(grads_across, query, i), rows, PANEL, n.width);
            softmax_grad(query, rows, i, diagonal);
            for (int k = rows; k < depth; k++)
                for (Matrix masked : {s, ds}) std::memset(masked.from(k, 0).first, 0, PANEL * sizeof(float));
        }
        Matrix p = {weights, BLOCK}, ds = {errors, BLOCK};
        Part upper = diagonal ? UPPER : ALL, lower = diagonal ? LOWER : ALL;
        product<false>(false, n.from(value_sums, key), p, n.from(grads, query), depth, n.columns, count, upper);
        product<false>(false, n.from(key_sums, key), ds, n.from(queries, query), depth, n.columns, count, upper);
        product<true>(false, n.from(query_sums, query), ds, n.from(keys, key), count, n.columns, depth, lower);
    }

    // Transposed block of tokens, from column `i` on.
    Matrix across(float* head, int token, int i) const { return {n.from(head, token).first + i, BLOCK}; }

    void run() {
        for (int key = 0; key < n.padded; key += BLOCK)
            for (int query = key; query < n.padded; query += BLOCK)
                block(key, std::min(BLOCK, n.padded - key), query, std::min(BLOCK, n.padded - query));
    }

    void write_queries(const Tensor& grad_q, int b, int h) const { unpack(query_sums, n.scale, grad_q, b, h, n); }

    void write_keys(const Tensor& grad_k, const Tensor& grad_v, int b, int h) const {
        unpack(key_sums, n.scale, grad_k, b, h, n), unpack(value_sums, 1, grad_v, b, h, n);
    }
};

}  // namespace

#include "attention_entry.h"
