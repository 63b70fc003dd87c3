// LLaMA decode step: tokens in, logits out. Compiled by build.py, called by decode.py.
//
// A row is a token: one per sequence, or one of several consecutive ones of a sequence, since all keys of a layer are
// written before any query attends to those up to its own. Every weight is read once, by gemv.h. The residual stream
// is in float32 whatever the weights' dtype. All threads run the whole step together,
// with a barrier where one needs results of others.
//
// B rows, D model width, V vocabulary, H query heads, K key/value heads, E head width, F feed-forward width, S slots.

#include <cmath>
#include <omp.h>
#include <vector>

#include "decode_attention.h"
#include "gemv.h"

extern "C" {

struct Layer {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;  // q_norm, k_norm: null without normalization of heads
    int64_t rotates;
    Matrix qkv, output, gate_up, down;
};

struct Model {
    int32_t dim, layers, heads, kv_heads, head_dim, hidden, vocab, max_rows, threads;
    float eps;
    const float* frequencies;  // E / 2
    const float* norm;
    Matrix embedding, head;
    const Layer* layer;
    float* memory;  // workspace of minillama_floats floats
};

// KV cache of a layer, (sequences, K, S, E), float32 or bfloat16.
struct Cache {
    void *keys, *values;
};

struct Token {
    int64_t id, sequence, slot, position, last;  // last: of its sequence, the one whose logits are returned
};
}

namespace {

void rms_norm(const float* x, const float* weight, int dim, float eps, float* y) {
    Vector squares = {};
    for (int i = 0; i < dim; i += WIDTH) squares += load<Vector>(x + i) * load<Vector>(x + i);
    float factor = 1 / std::sqrt(sum(squares) / dim + eps);
    for (int i = 0; i < dim; i += WIDTH) store(y + i, load<Vector>(x + i) * factor * load<Vector>(weight + i));
}

// Rotary position embedding: rotate the pairs (x_i, x_{i + E/2}) by position * frequency_i.
void rotate(float* x, int width, const float* cosine, const float* sine) {
    for (int i = 0; i < width / 2; i++) {
        float a = x[i], b = x[i + width / 2];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + width / 2] = b * cosine[i] + a * sine[i];
    }
}

template <class T>
void store_kv(T* to, const float* from, int width) {
    for (int i = 0; i < width; i++)
        if constexpr (sizeof(T) == 4) to[i] = from[i];
        else to[i] = f32_to_bf16(from[i]);
}

// SwiGLU activation silu(gate) * up of channels `begin` to `end`: `gates` holds the F gates, then the F ups.
void gate(const float* gates, int F, int begin, int end, float* hidden) {
    for (int i = begin; i < end; i += WIDTH) {
        Vector g = load<Vector>(gates + i);
        store(hidden + i, g / (1 + exp(-g)) * load<Vector>(gates + F + i));
    }
}

constexpr int UNIT = LINE / sizeof(float);

struct Share {  // this thread's share of `count` channels, in whole cache lines
    int begin, end;
    Share(int count) {
        int threads = omp_get_num_threads(), me = omp_get_thread_num(), units = (count + UNIT - 1) / UNIT;
        begin = std::min(count, units * me / threads * UNIT);
        end = std::min(count, units * (me + 1) / threads * UNIT);
    }
};

// Bump allocator over `memory`.
struct Arena {
    float* memory;  // null to count only
    size_t used = 0;

    float* take(size_t floats) {
        float* taken = memory ? memory + used : nullptr;
        used += (floats + UNIT - 1) / UNIT * UNIT;  // whole cache lines
        return taken;
    }
};

int widest(const Model& m) { return std::max({m.dim, m.heads * m.head_dim, m.hidden}); }

// Inputs of a matrix product, normalized and in integers.
struct Prepared {
    float *normed, *scales, *sums;
    int16_t* integers;

    Prepared(const Model& m, size_t rows, Arena& arena) {
        normed = arena.take(rows * m.dim);
        scales = arena.take(rows * spans(widest(m)));
        sums = arena.take(rows * spans(widest(m)) * (SPAN / GROUP));
        integers = (int16_t*)arena.take(rows * widest(m) / 2);
    }
};

constexpr int TOGETHER = 32;  // rows from which on threads prepare inputs together: for fewer a barrier takes longer

inline bool together(int rows) { return rows >= TOGETHER && !has_tiles(); }

// Buffers shared by all threads, by row.
struct Shared {
    float *x, *qkv, *heads, *hidden, *result, *rotations;
    Prepared prepared;

    Shared(const Model& m, Arena& arena) : prepared(m, together(m.max_rows) ? m.max_rows : 0, arena) {
        size_t rows = m.max_rows;
        x = arena.take(rows * m.dim);
        qkv = arena.take(rows * (m.heads + 2 * m.kv_heads) * m.head_dim);
        heads = arena.take(rows * m.heads * m.head_dim);
        hidden = arena.take(rows * m.hidden);
        result = arena.take(rows * std::max(m.dim, 2 * m.hidden));
        rotations = arena.take(rows * m.head_dim);
    }
};

// Buffers per thread.
struct Own {
    Prepared prepared;
    float* scores;
    Workspace workspace;

    Own(const Model& m, int slots, Arena& arena) : prepared(m, has_tiles() ? m.max_rows : TOGETHER, arena) {
        scores = arena.take(std::max(slots + WIDTH, QUERIES * HELD));
        workspace.unpacked = arena.take(size_t(BLOCK) * widest(m) / 2);
        workspace.parts = (uint32_t*)arena.take(parts_size(m.max_rows, widest(m)));
    }
};

// Where blocks of tokens of one sequence begin, whose queries are taken together; none if each is taken by itself.
std::vector<int> query_blocks(const Token* tokens, int rows, int window, int group) {
    std::vector<int> begins;
    if (window > 0 || rows < TOGETHER) return begins;
    for (int b = 0; b <= rows; b++)
        if (b == 0 || b == rows || tokens[b].sequence != tokens[b - 1].sequence || (b - begins.back() + 1) * group > QUERIES)
            begins.push_back(b);
    return begins;
}

// Attention of all rows, by all threads; `scores` are this thread's.
template <class T>
void attend_all(const Model& m, const Layer& layer, int rows, const Token* tokens, const std::vector<int>& blocks,
                const T* keys, const T* values, int slots, int window, int sinks, const Shared& shared, float* scores) {
    const int E = m.head_dim, Q = m.heads * E, group = m.heads / m.kv_heads;
    auto query = [&](int b, int h) {
        float* q = shared.qkv + size_t(b) * (Q + 2 * m.kv_heads * E) + h * E;
        const float* cosine = shared.rotations + size_t(b) * E;
        if (layer.q_norm) rms_norm(q, layer.q_norm, E, m.eps, q);
        if (layer.rotates) rotate(q, E, cosine, cosine + E / 2);
        return q;
    };
    if (blocks.empty()) {
#pragma omp for
        for (int n = 0; n < rows * m.heads; n++) {
            int b = n / m.heads, h = n % m.heads;
            size_t at = (tokens[b].sequence * m.kv_heads + h / group) * slots * E;
            VisibleSlots visible(int(tokens[b].slot) + 1, window, sinks);
            attend(query(b, h), keys + at, values + at, visible, E, scores, shared.heads + size_t(b) * Q + h * E);
        }
        return;
    }
#pragma omp for schedule(dynamic)  // later tokens see more slots
    for (int n = 0; n < int(blocks.size() - 1) * m.kv_heads; n++) {
        int begin = blocks[n / m.kv_heads], end = blocks[n / m.kv_heads + 1], k = n % m.kv_heads;
        size_t at = (tokens[begin].sequence * m.kv_heads + k) * slots * E;
        for (int first = 0; first < group; first += QUERIES) {
            Query queries[QUERIES];
            int taken = 0;
            for (int b = begin; b < end; b++)
                for (int h = k * group + first; h < (k + 1) * group && h < k * group + first + QUERIES; h++)
                    queries[taken++] = {query(b, h), shared.heads + size_t(b) * Q + h * E, int(tokens[b].slot) + 1};
            attend_block(queries, taken, keys + at, values + at, E, scores);
        }
    }
}

template <class T>
void step(const Model& m, int rows, const Token* tokens, const Cache* caches, int slots, int window, int sinks,
          float* logits) {
    const int D = m.dim, E = m.head_dim, Q = m.heads * E, KV = m.kv_heads * E, all = Q + 2 * KV, F = m.hidden;
    int count = rows;  // of inputs
    const std::vector<int> blocks = query_blocks(tokens, rows, window, m.heads / m.kv_heads);
#pragma omp parallel num_threads(m.threads)
    {
        Arena arena = {m.memory};
        Shared shared(m, arena);
        Own own(m, slots, arena);
        for (int t = 0; t < omp_get_thread_num(); t++) own = Own(m, slots, arena);
        TileUnit unit(rows >= FEWEST && has_tiles());

        // Inputs of a matrix, with RMSNorm or without.
        auto prepare = [&](const Matrix& matrix, const float* from, const float* norm) -> Inputs {
            const int width = matrix.columns;
            const bool tiles = takes_tiles(matrix, count);
            const bool integers = of_integers(matrix.kind) && !(tiles && matrix.rows % SIDE == 0);  // for rows left over
            const Prepared& to = together(count) ? shared.prepared : own.prepared;
            auto one = [&](int b) {
                const float* x = from + size_t(b) * width;
                float* normed = to.normed + size_t(b) * width;
                if (norm) rms_norm(x, norm, width, m.eps, normed);
                size_t span = size_t(b) * spans(width);
                if (integers)
                    quantize(norm ? normed : x, matrix, to.integers + size_t(b) * width, to.scales + span,
                             matrix.kind == INT4 && count < MANY ? to.sums + span * (SPAN / GROUP) : nullptr);
            };
            if (together(count)) {
#pragma omp for
                for (int b = 0; b < count; b++) one(b);
            } else {
                for (int b = 0; b < count; b++) one(b);
            }
            Inputs in = {norm ? to.normed : from, size_t(width), count, to.integers, to.scales, to.sums, nullptr};
            if (tiles) {
                lay_out(in, width, own.workspace.parts);
                in.parts = own.workspace.parts;
            }
            return in;
        };
        auto add_product = [&](const Matrix& matrix, const float* from) {
            Share share(D);
            multiply(matrix, share.begin, share.end, prepare(matrix, from, nullptr), {shared.result, size_t(D)}, own.workspace);
            for (int b = 0; b < rows; b++) {
                float *x = shared.x + size_t(b) * D, *y = shared.result + size_t(b) * D;
                for (int i = share.begin; i < share.end; i++) x[i] += y[i];
            }
        };

#pragma omp for
        for (int b = 0; b < rows; b++) {
            float* x = shared.x + size_t(b) * D;
            size_t at = size_t(tokens[b].id) * D;
            for (int i = 0; i < D; i++)
                x[i] = m.embedding.kind == FLOAT32 ? ((const float*)m.embedding.weights)[at + i]
                                                   : bf16_to_f32(((const uint16_t*)m.embedding.weights)[at + i]);
            float *cosine = shared.rotations + size_t(b) * E, *sine = cosine + E / 2;
            for (int i = 0; i < E / 2; i++) {
                float angle = float(tokens[b].position) * m.frequencies[i];
                cosine[i] = std::cos(angle);
                sine[i] = std::sin(angle);
            }
        }
        for (int l = 0; l < m.layers; l++) {
            const Layer& layer = m.layer[l];
            T *keys = (T*)caches[l].keys, *values = (T*)caches[l].values;

            Share part(all);
            Inputs normed = prepare(layer.qkv, shared.x, layer.attention_norm);
            multiply(layer.qkv, part.begin, part.end, normed, {shared.qkv, size_t(all)}, own.workspace);
#pragma omp barrier
#pragma omp for
            for (int n = 0; n < rows * m.kv_heads; n++) {
                int b = n / m.kv_heads, k = n % m.kv_heads;
                float* key = shared.qkv + size_t(b) * all + Q + k * E;
                const float* cosine = shared.rotations + size_t(b) * E;
                if (layer.k_norm) rms_norm(key, layer.k_norm, E, m.eps, key);
                if (layer.rotates) rotate(key, E, cosine, cosine + E / 2);
                size_t at = ((tokens[b].sequence * m.kv_heads + k) * slots + tokens[b].slot) * E;
                store_kv(keys + at, key, E);
                store_kv(values + at, key + KV, E);
            }
            attend_all(m, layer, rows, tokens, blocks, keys, values, slots, window, sinks, shared, own.scores);
            add_product(layer.output, shared.heads);
#pragma omp barrier
            Inputs in = prepare(layer.gate_up, shared.x, layer.mlp_norm);
            Share units(F);
            for (int half : {0, F})
                multiply(layer.gate_up, half + units.begin, half + units.end, in, {shared.result, 2 * size_t(F)}, own.workspace);
            for (int b = 0; b < rows; b++)
                gate(shared.result + 2 * size_t(b) * F, F, units.begin, units.end, shared.hidden + size_t(b) * F);
#pragma omp barrier
            add_product(layer.down, shared.hidden);
#pragma omp barrier
        }
#pragma omp single
        {
            count = 0;
            for (int b = 0; b < rows; b++)
                if (tokens[b].last) std::memmove(shared.x + size_t(count++) * D, shared.x + size_t(b) * D, D * sizeof(float));
        }
        Share vocabulary(m.vocab);
        Inputs last_hidden = prepare(m.head, shared.x, m.norm);
        multiply(m.head, vocabulary.begin, vocabulary.end, last_hidden, {logits, size_t(m.vocab)}, own.workspace);
    }
}

}  // namespace

extern "C" {

// Workspace in floats for caches of `slots` slots.
size_t minillama_floats(const Model* model, int32_t slots) {
    Arena arena = {nullptr};
    Shared(*model, arena);
    for (int thread = 0; thread < model->threads; thread++) Own(*model, slots, arena);
    return arena.used;
}

// Maximum number of rows for which the step is faster than torch's operations.
int32_t minillama_at_once([[maybe_unused]] const Model* model) {
#if defined __AVX512F__
    return has_tiles() ? 96 : of_integers(model->layer[0].gate_up.kind) ? INT32_MAX : 31;
#elif defined __AVX2__
    return INT32_MAX;
#else
    return 1;
#endif
}

// Decode step of tokens, ordered by position per sequence, `max_rows` at a time: append to the KV cache and write
// logits (sequences, V). `bf16_caches`: of bfloat16. `window`: 0 is unlimited.
void minillama_step(const Model* model, int32_t rows, const Token* tokens, const Cache* caches, int32_t slots,
                    int32_t bf16_caches, int32_t window, int32_t sinks, float* logits) {
    auto run = bf16_caches ? step<uint16_t> : step<float>;
    for (const Token* end = tokens + rows; tokens < end; tokens += model->max_rows) {
        int count = int(std::min<int64_t>(model->max_rows, end - tokens));
        run(*model, count, tokens, caches, slots, window, sinks, logits);
        for (int b = 0; b < count; b++) logits += tokens[b].last ? model->vocab : 0;
    }
}
}
