// SwiGLU, y = (silu(x G^T) * (x U^T)) D^T, and its gradients in bfloat16, a block of tokens at a time, so that hidden
// activations never leave the L2 cache in the forward pass; the backward pass recomputes them (activation
// checkpointing, Chen et al. 2016, arXiv 1604.06174). Compiled by build.py, called by swiglu.py.
//
// Weights are packed into tiles first, as operands of gemm_bf16.h. In the backward pass each block of tokens stores the
// gradients of gate and up and the hidden activations as right operands, and x^T and dy^T as left ones. After some
// hundred tokens per thread, while these are still in the caches, they are accumulated into the weights' gradients, one
// part per thread.

#include <cmath>
#include <cstdint>
#include <omp.h>

#include "gemm_bf16.h"

namespace {

constexpr int BLOCK = 16;  // tiles of 16 tokens per block
constexpr int CHUNK = 16;  // tiles of 32 tokens per accumulation of weights' gradients, a multiple of BLOCK / 2
constexpr int DOWN = 32, ACROSS = 4;  // tiles of a weight's gradient per part

struct Sizes {
    int tokens, dim, hidden, threads;
    int t, s, chunks;      // tiles of 16 and of 32 tokens, and chunks of the latter held at once
    int d, wide, h, deep;  // tiles of 16 and of 32 of the model width, and of the hidden width
    Sizes(int tokens, int dim, int hidden, int threads)
        : tokens(tokens), dim(dim), hidden(hidden), threads(threads), t((tokens + 31) / 32 * 2), s(t / 2),
          chunks(std::min(threads, (s + CHUNK - 1) / CHUNK)), d(dim / 16), wide(dim / 32), h(hidden / 16), deep(hidden / 32) {}
};

// Sigmoid 1 / (1 + e^-x), at least 2^-126: below, the exponential has no reciprocal in float32.
inline __m512 sigmoid(__m512 x) {
    __m512 exponent = _mm512_min_ps(_mm512_set1_ps(126), _mm512_mul_ps(x, _mm512_set1_ps(float(-M_LOG2E))));
    __m512 z = _mm512_add_ps(_mm512_set1_ps(1), fast_exp2(exponent));
    __m512 guess = _mm512_rcp14_ps(z);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(z, guess, _mm512_set1_ps(2)));  // one Newton step
}

inline void store_half(Half* to, __m256i row) { _mm256_storeu_si256((__m256i*)to, row); }

// Store `count` rows of two adjacent tiles to a matrix.
void write_rows(const float* left, Half* to, int64_t stride, int count) {
    for (int r = 0; r < std::min(count, SIDE); r++)
        for (int i = 0; i < 2; i++)
            store_half(to + r * stride + i * SIDE, f32_to_bf16(_mm512_load_ps(left + i * FLOATS + r * SIDE)));
}

// Workspace of one thread for a block of tokens.
struct Workspace {
    Tiles x, grad, first, second;  // rows of x, of dy, and of the hidden activations or the gradients of gate and up
    Sums gate, up, product;
    Workspace(Memory& memory, const Sizes& n)
        : x(memory.take<Half>(BLOCK, n.wide)), grad(memory.take<Half>(BLOCK, n.wide)),
          first(memory.take<Half>(BLOCK, n.deep)), second(memory.take<Half>(BLOCK, n.deep)),
          gate(memory.take<float>(BLOCK, 2)), up(memory.take<float>(BLOCK, 2)), product(memory.take<float>(BLOCK, 2)) {}

    // Store the block's rows from column 32 c on, held by `product`.
    void write(Half* to, int first_tile, int count, int c, const Sizes& n) const {
        for (int t = 0; t < count; t++) {
            int token = (first_tile + t) * SIDE;
            write_rows(product(t, 0), to + int64_t(token) * n.dim + c * DEPTH, n.dim, n.tokens - token);
        }
    }
};

struct Forward {
    Tiles gate, up, down;  // right operands, with the width as inner dimension
    Forward(Memory& memory, const Sizes& n)
        : gate(memory.take<Half>(n.h, n.wide)), up(memory.take<Half>(n.h, n.wide)), down(memory.take<Half>(n.d, n.deep)) {}

    void load(const Sizes& n, const Rows& g, const Rows& u, const Rows& d) {
#pragma omp for nowait
        for (int h = 0; h < n.h; h++) pack_rows(g, h, gate, h, true), pack_rows(u, h, up, h, true);
#pragma omp for
        for (int i = 0; i < n.d; i++) pack_rows(d, i, down, i, true);
    }

    void block(const Sizes& n, Workspace& own, const Rows& x, Half* y, int first) const {
        const int count = std::min(BLOCK, n.t - first);
        const Range rows = {0, count}, pair = {0, 2};
        for (int t = 0; t < count; t++) pack_rows(x, first + t, own.x, t, false);
        for (int j = 0; j < n.deep; j++) {
            product(true, own.gate, rows, pair, own.x, {gate(2 * j, 0), n.wide}, {0, n.wide});
            product(true, own.up, rows, pair, own.x, {up(2 * j, 0), n.wide}, {0, n.wide});
            for (int t = 0; t < count; t++)
                for (int i = 0; i < 2; i++)
                    for (int r = 0; r < SIDE; r++) {
                        __m512 g = _mm512_load_ps(own.gate(t, i) + r * SIDE), u = _mm512_load_ps(own.up(t, i) + r * SIDE);
                        store_half(own.first(t, j) + r * DEPTH + i * SIDE,
                                   f32_to_bf16(_mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u)));
                    }
        }
        for (int c = 0; c < n.wide; c++) {
            product(true, own.product, rows, pair, own.first, {down(2 * c, 0), n.deep}, {0, n.deep});
            own.write(y, first, count, c, n);
        }
    }
};

struct Backward {
    Tiles gate, up, down;                        // right operands for the hidden activations and their gradient
    Tiles gate_pairs, up_pairs;                  // and for dx
    Tiles x_transposed, grads_transposed;        // x^T and dy^T, chunks concatenated by rows
    Tiles to_gate, to_up, to_product;
    Sums sums[3];                                // gradients of the weights, (D, H)
    Backward(Memory& memory, const Sizes& n)
        : gate(memory.take<Half>(n.h, n.wide)), up(memory.take<Half>(n.h, n.wide)), down(memory.take<Half>(n.h, n.wide)),
          gate_pairs(memory.take<Half>(n.d, n.deep)), up_pairs(memory.take<Half>(n.d, n.deep)),
          x_transposed(memory.take<Half>(n.chunks * n.d, CHUNK)),
          grads_transposed(memory.take<Half>(n.chunks * n.d, CHUNK)),
          to_gate(memory.take<Half>(n.chunks * n.h, CHUNK)), to_up(memory.take<Half>(n.chunks * n.h, CHUNK)),
          to_product(memory.take<Half>(n.chunks * n.h, CHUNK)),
          sums{memory.take<float>(n.d, n.h), memory.take<float>(n.d, n.h), memory.take<float>(n.d, n.h)} {}

    void load(const Sizes& n, const Rows& g, const Rows& u, const Rows& d) {
#pragma omp for nowait
        for (int h = 0; h < n.h; h++) pack_rows(g, h, gate, h, true), pack_rows(u, h, up, h, true);
#pragma omp for nowait
        for (int s = 0; s < n.wide; s++) pack_pairs(d, s, down, false);
#pragma omp for
        for (int s = 0; s < n.deep; s++) pack_pairs(g, s, gate_pairs, false), pack_pairs(u, s, up_pairs, false);
    }

    // Gradients of gate and up in 32 hidden channels of a block of tokens as left operands, and the same with the hidden
    // activations, in pairs of tokens, as right ones.
    void hidden_grad(const Sizes& n, Workspace& own, int first, int count, int j) const {
        for (int t = 0; t < count; t++) {
            const int s = (first + t) / 2, row = s / CHUNK % n.chunks * n.h + 2 * j;
            for (int i = 0; i < 2; i++)
                for (int r = 0; r < SIDE; r += 2) {
                    __m256i gates[2], ups[2], products[2];
                    for (int next = 0; next < 2; next++) {
                        const int at = (r + next) * SIDE, offset = (r + next) * DEPTH + i * SIDE;
                        __m512 g = _mm512_load_ps(own.gate(t, i) + at), u = _mm512_load_ps(own.up(t, i) + at);
                        __m512 error = _mm512_load_ps(own.product(t, i) + at), part = sigmoid(g), silu = _mm512_mul_ps(g, part);
                        __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1), part), part);
                        products[next] = f32_to_bf16(_mm512_mul_ps(silu, u));
                        gates[next] = f32_to_bf16(_mm512_mul_ps(_mm512_mul_ps(error, u), slope));
                        ups[next] = f32_to_bf16(_mm512_mul_ps(error, silu));
                        store_half(own.first(t, j) + offset, gates[next]);
                        store_half(own.second(t, j) + offset, ups[next]);
                    }
                    const int pair = ((first + t) % 2 * SIDE + r) * SIDE;
                    _mm512_store_si512(to_gate(row + i, s % CHUNK) + pair, paired(gates[0], gates[1]));
                    _mm512_store_si512(to_up(row + i, s % CHUNK) + pair, paired(ups[0], ups[1]));
                    _mm512_store_si512(to_product(row + i, s % CHUNK) + pair, paired(products[0], products[1]));
                }
        }
    }

    void block(const Sizes& n, Workspace& own, const Rows& x, const Rows& grad, Half* grad_x, int first) const {
        const int count = std::min(BLOCK, n.t - first);
        const Range rows = {0, count}, pair = {0, 2};
        for (int t = 0; t < count; t++)
            pack_rows(x, first + t, own.x, t, false), pack_rows(grad, first + t, own.grad, t, false);
        for (int s = first / 2; s < (first + count) / 2; s++) {
            const int chunk = s / CHUNK, row = chunk % n.chunks * n.d;
            pack_pairs(x.from(chunk * CHUNK * DEPTH), s % CHUNK, {x_transposed(row, 0), CHUNK}, true);
            pack_pairs(grad.from(chunk * CHUNK * DEPTH), s % CHUNK, {grads_transposed(row, 0), CHUNK}, true);
        }
        for (int j = 0; j < n.deep; j++) {
            product(true, own.gate, rows, pair, own.x, {gate(2 * j, 0), n.wide}, {0, n.wide});
            product(true, own.up, rows, pair, own.x, {up(2 * j, 0), n.wide}, {0, n.wide});
            product(true, own.product, rows, pair, own.grad, {down(2 * j, 0), n.wide}, {0, n.wide});
            hidden_grad(n, own, first, count, j);
        }
        for (int c = 0; c < n.wide; c++) {
            product(true, own.product, rows, pair, own.first, {gate_pairs(2 * c, 0), n.deep}, {0, n.deep});
            product(false, own.product, rows, pair, own.second, {up_pairs(2 * c, 0), n.deep}, {0, n.deep});
            own.write(grad_x, first, count, c, n);
        }
    }

    // Accumulate the chunks from tile `begin` of 32 tokens on into a part of one weight's gradient.
    void add(const Sizes& n, int begin, int which, int d, int h) const {
        const Tiles left = which == 2 ? grads_transposed : x_transposed;
        const Tiles right = which == 0 ? to_gate : which == 1 ? to_up : to_product;
        const Range down = {d, std::min(d + DOWN, n.d)}, across = {h, std::min(h + ACROSS, n.h)};
        for (int chunk = 0, s = begin; chunk < n.chunks && s < n.s; chunk++, s += CHUNK)
            product(s == 0, sums[which], down, across, {left(chunk * n.d, 0), CHUNK}, {right(chunk * n.h, 0), CHUNK},
                    {0, std::min(CHUNK, n.s - s)});
    }

    // Write a part as (D, H), or as (H, D) if `transposed`.
    void write(const Sizes& n, int which, int d, int h, Half* to, bool transposed) const {
        for (int i = d; i < std::min(d + DOWN, n.d); i++)
            for (int j = h; j < std::min(h + ACROSS, n.h); j++) {
                Row tile[SIDE];
                for (int r = 0; r < SIDE; r++) tile[r] = (Row)_mm512_load_ps(sums[which](i, j) + r * SIDE);
                if (transposed) transpose(tile);
                Half* first = transposed ? to + int64_t(j) * SIDE * n.dim + i * SIDE
                                         : to + int64_t(i) * SIDE * n.hidden + j * SIDE;
                for (int r = 0; r < SIDE; r++)
                    store_half(first + r * (transposed ? n.dim : n.hidden), f32_to_bf16((__m512)tile[r]));
            }
    }
};

template <class Pass>
int64_t work_bytes(const Sizes& n) {
    Memory shared = {nullptr}, own = {nullptr};
    Pass pass(shared, n);
    Workspace workspace(own, n);
    return int64_t(shared.next - (char*)nullptr) + n.threads * int64_t(own.next - (char*)nullptr);
}

// Run `each(pass, own)` in every thread.
template <class Pass, class Each>
void by_threads(const Sizes& n, char* work, const Each& each) {
    Memory memory = {work}, measured = {nullptr};
    Pass pass(memory, n);
    Workspace workspace(measured, n);
#pragma omp parallel num_threads(n.threads)
    {
        TileUnit unit;
        Memory mine = {memory.next + omp_get_thread_num() * (measured.next - (char*)nullptr)};
        Workspace own(mine, n);
        each(pass, own);
    }
}

}  // namespace

extern "C" {

// Request the AMX tile registers from Linux, once per process. Returns whether the kernels can run.
int32_t minillama_ready() { return has_tiles(); }

// Workspace in bytes, to be 64-byte aligned.
int64_t minillama_mlp_work(int32_t tokens, int32_t dim, int32_t hidden, int32_t threads, int32_t backward) {
    Sizes n(tokens, dim, hidden, threads);
    return backward ? work_bytes<Backward>(n) : work_bytes<Forward>(n);
}

// y (N, D) of x (N, D) and the weights G (H, D), U (H, D), D (D, H), all contiguous.
void minillama_mlp(int32_t tokens, int32_t dim, int32_t hidden, int32_t threads, char* work, const Half* x,
                   const Half* gate, const Half* up, const Half* down, Half* y) {
    Sizes n(tokens, dim, hidden, threads);
    by_threads<Forward>(n, work, [&](Forward& pass, Workspace& own) {
        pass.load(n, {gate, dim, hidden, dim}, {up, dim, hidden, dim}, {down, hidden, dim, hidden});
#pragma omp for schedule(dynamic)
        for (int first = 0; first < n.t; first += BLOCK) pass.block(n, own, {x, dim, tokens, dim}, y, first);
    });
}

// Gradients with respect to x and, unless null, the weights, from that of y.
void minillama_mlp_backward(int32_t tokens, int32_t dim, int32_t hidden, int32_t threads, char* work, const Half* x,
                            const Half* gate, const Half* up, const Half* down, const Half* grad, Half* grad_x,
                            Half* grad_gate, Half* grad_up, Half* grad_down) {
    Sizes n(tokens, dim, hidden, threads);
    const int across = (n.h + ACROSS - 1) / ACROSS, parts = across * ((n.d + DOWN - 1) / DOWN);
    Half* const grads[3] = {grad_gate, grad_up, grad_down};
    by_threads<Backward>(n, work, [&](Backward& pass, Workspace& own) {
        pass.load(n, {gate, dim, hidden, dim}, {up, dim, hidden, dim}, {down, hidden, dim, hidden});
        for (int begin = 0; begin < n.s; begin += n.chunks * CHUNK) {
            const int end = std::min(n.t, 2 * (begin + n.chunks * CHUNK));
#pragma omp for schedule(dynamic)
            for (int first = 2 * begin; first < end; first += BLOCK)
                pass.block(n, own, {x, dim, tokens, dim}, {grad, dim, tokens, dim}, grad_x, first);
            if (!grad_gate) continue;
#pragma omp for schedule(static)
            for (int part = 0; part < 3 * parts; part++) {
                const int which = part / parts, d = part % parts / across * DOWN, h = part % across * ACROSS;
                pass.add(n, begin, which, d, h);
                if (end == n.t) pass.write(n, which, d, h, grads[which], which != 2);
            }
        }
    });
}
}
