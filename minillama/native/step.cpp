// One decode step of a LLaMA: a token a row in, logits out. Compiled by building.py, called by step.py.
//
// Every weight is read once. Sums are taken in float32 whatever the weights' type, and the residual stream stays in it.
// All threads go through the whole step together and meet at a barrier where one needs what others have made.
//
// B rows, D model width, V vocabulary, H query heads, K key/value heads, E head width, F feed-forward width, S slots.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int WIDTH = 16;  // floats of a vector; the compiler splits it where the processor's are shorter
typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
typedef uint8_t Nibbles __attribute__((vector_size(WIDTH)));

template <class T>
inline T load(const void* from) {
    T vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

inline float sum(Vector v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return v[0] + v[1];
}

inline float widened(uint16_t bits) {  // bfloat16 is the upper half of a float32
    uint32_t whole = uint32_t(bits) << 16;
    return load<float>(&whole);
}

inline uint16_t shortened(float value) {  // to the nearest bfloat16, ties to even
    uint32_t bits = load<uint32_t>(&value);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __AVX512F__  // one instruction each, which GCC does not find by itself
inline Ints whole(Halves x) { return (Ints)_mm512_cvtepu16_epi32((__m256i)x); }
inline Ints whole(Bytes x) { return (Ints)_mm512_cvtepi8_epi32((__m128i)x); }
inline Ints whole(Nibbles x) { return (Ints)_mm512_cvtepu8_epi32((__m128i)x); }
#else
inline Ints whole(Halves x) { return __builtin_convertvector(x, Ints); }
template <class T>  // by way of 16 bits: GCC takes the whole way number by number
inline Ints whole(T x) { return __builtin_convertvector(__builtin_convertvector(x, Shorts), Ints); }
#endif

inline Vector widened(Halves x) { return (Vector)(whole(x) << 16); }

}  // namespace

extern "C" {

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };

// (rows, columns) in row order. INT8: w = q scale[row]. INT4: for 32 columns 16 bytes, byte j with column j in its low
// half and column j + 16 in its high half, and grid[row, group] = (s, z) in bfloat16: w = (q - 8) s + z.
struct Matrix {
    Kind kind;
    int32_t rows, columns;
    const void* weights;
    const float* scale;
    const uint16_t* grid;
    const float* bias;  // or null
};

struct Layer {
    const float *attention_norm, *mlp_norm;
    Matrix qkv, output, gate_up, down;
};

struct Model {
    int32_t dim, layers, heads, kv_heads, head_dim, hidden, vocab, max_rows, threads;
    float eps;
    const float* frequencies;  // E / 2
    const float* norm;
    Matrix embedding, head;
    const Layer* layer;
    float* memory;  // see `floats`
};

// Keys and values of a layer, (B, K, S, E), float32 or bfloat16.
struct Cache {
    void *keys, *values;
};
}

namespace {

template <Kind kind>
inline Vector weights_at(const Matrix& m, size_t at) {
    if constexpr (kind == FLOAT32) return load<Vector>((const float*)m.weights + at);
    if constexpr (kind == BFLOAT16) return widened(load<Halves>((const uint16_t*)m.weights + at));
    if constexpr (kind == INT8)
        return __builtin_convertvector(whole(load<Bytes>((const int8_t*)m.weights + at)), Vector);
}

// Have weights come that are wanted a few rows later: rows are short, and the processor guesses no further than one.
template <Kind kind>
inline void ahead(const Matrix& m, size_t at) {
    constexpr int bytes = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1;
    __builtin_prefetch((const char*)m.weights + at * bytes);
}

// out[b][row + r] = sum_i w[row + r, i] x[b][i] for R rows and B inputs.
template <Kind kind, int R, int B>
inline void tile(const Matrix& m, int row, const float* const* x, float* const* out) {
    Vector total[R][B] = {};
    for (int i = 0; i < m.columns; i += WIDTH) {
        Vector in[B];
        for (int b = 0; b < B; b++) in[b] = load<Vector>(x[b] + i);
        for (int r = 0; r < R; r++) {
            ahead<kind>(m, size_t(row + r + R) * m.columns + i);
            Vector w = weights_at<kind>(m, size_t(row + r) * m.columns + i);
            for (int b = 0; b < B; b++) total[r][b] += w * in[b];
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            float y = sum(total[r][b]);
            if (kind == INT8) y *= m.scale[row + r];
            out[b][row + r] = m.bias ? y + m.bias[row + r] : y;
        }
}

// The same for INT4; `sums` are those of 32 inputs each, which an offset multiplies.
template <int R, int B>
inline void tile_int4(const Matrix& m, int row, const float* const* x, const float* const* sums, float* const* out) {
    int groups = m.columns / 32;
    Vector total[R][B] = {};
    float offsets[R][B] = {};
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < R; r++) {
            size_t at = size_t(row + r) * groups + g;
            __builtin_prefetch((const char*)m.weights + 16 * (at + R * groups));
            Ints pairs = whole(load<Nibbles>((const uint8_t*)m.weights + 16 * at));
            Vector low = __builtin_convertvector(pairs & 15, Vector), high = __builtin_convertvector(pairs >> 4, Vector);
            float s = widened(m.grid[2 * at]), z = widened(m.grid[2 * at + 1]) - 8 * s;
            for (int b = 0; b < B; b++) {
                const float* in = x[b] + 32 * g;
                total[r][b] += s * (low * load<Vector>(in) + high * load<Vector>(in + WIDTH));
                offsets[r][b] += z * sums[b][g];
            }
        }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            float y = sum(total[r][b]) + offsets[r][b];
            out[b][row + r] = m.bias ? y + m.bias[row + r] : y;
        }
}

template <Kind kind, int R, int B>
void some_inputs(const Matrix& m, int begin, int end, const float* const* x, const float* const* sums, float* const* out) {
    int row = begin;
    if constexpr (kind == INT4) {
        for (; row + R <= end; row += R) tile_int4<R, B>(m, row, x, sums, out);
        for (; row < end; row++) tile_int4<1, B>(m, row, x, sums, out);
    } else {
        for (; row + R <= end; row += R) tile<kind, R, B>(m, row, x, out);
        for (; row < end; row++) tile<kind, 1, B>(m, row, x, out);
    }
}

// A row of INT4 in float32.
void expand(const Matrix& m, int row, float* to) {
    for (int g = 0; g < m.columns / 32; g++) {
        size_t at = size_t(row) * (m.columns / 32) + g;
        Ints pairs = whole(load<Nibbles>((const uint8_t*)m.weights + 16 * at));
        float s = widened(m.grid[2 * at]), z = widened(m.grid[2 * at + 1]) - 8 * s;
        store(to + 32 * g, __builtin_convertvector(pairs & 15, Vector) * s + z);
        store(to + 32 * g + WIDTH, __builtin_convertvector(pairs >> 4, Vector) * s + z);
    }
}

template <Kind kind>
void rows_of(const Matrix& m, int begin, int end, int inputs, const float* const* x, const float* const* sums, float* const* out) {
    int b = 0;
    for (; b + 8 <= inputs; b += 8) some_inputs<kind, 2, 8>(m, begin, end, x + b, sums + b, out + b);
    for (; b + 4 <= inputs; b += 4) some_inputs<kind, 4, 4>(m, begin, end, x + b, sums + b, out + b);
    for (; b < inputs; b++) some_inputs<kind, 4, 1>(m, begin, end, x + b, sums + b, out + b);
}

constexpr int BLOCK = 8;  // rows of weights at once, which stay in the nearest cache for all inputs

template <Kind kind>
void product(const Matrix& m, int begin, int end, int inputs, const float* const* x, const float* const* sums, float* const* out,
             float* expanded) {
    if (inputs == 1) return some_inputs<kind, 4, 1>(m, begin, end, x, sums, out);
    float* shifted[inputs];
    for (int row = begin; row < end; row += BLOCK) {
        int count = std::min(BLOCK, end - row);
        if (kind != INT4 || inputs < 4) {
            rows_of<kind>(m, row, row + count, inputs, x, sums, out);
            continue;
        }
        for (int r = 0; r < count; r++) {  // nibbles cost more to take apart than to read again
            for (int g = 0; g < m.columns / 128; g++)
                __builtin_prefetch((const char*)m.weights + size_t(row + r + BLOCK) * m.columns / 2 + 64 * g);
            expand(m, row + r, expanded + size_t(r) * m.columns);
        }
        Matrix block = {FLOAT32, count, m.columns, expanded, nullptr, nullptr, m.bias ? m.bias + row : nullptr};
        for (int i = 0; i < inputs; i++) shifted[i] = out[i] + row;
        rows_of<FLOAT32>(block, 0, count, inputs, x, sums, shifted);
    }
}

// Rows `begin` to `end` of y = W x for every input. `expanded` has room for BLOCK rows.
void multiply(const Matrix& m, int begin, int end, int rows, const float* const* x, const float* const* sums, float* const* out,
              float* expanded) {
    switch (m.kind) {
        case FLOAT32: return product<FLOAT32>(m, begin, end, rows, x, sums, out, expanded);
        case BFLOAT16: return product<BFLOAT16>(m, begin, end, rows, x, sums, out, expanded);
        case INT8: return product<INT8>(m, begin, end, rows, x, sums, out, expanded);
        case INT4: return product<INT4>(m, begin, end, rows, x, sums, out, expanded);
    }
}

void group_sums(const float* x, int columns, float* sums) {
    for (int g = 0; g < columns / 32; g++) sums[g] = sum(load<Vector>(x + 32 * g) + load<Vector>(x + 32 * g + WIDTH));
}

void rms_norm(const float* x, const float* weight, int dim, float eps, float* y) {
    Vector squares = {};
    for (int i = 0; i < dim; i += WIDTH) squares += load<Vector>(x + i) * load<Vector>(x + i);
    float factor = 1 / std::sqrt(sum(squares) / dim + eps);
    for (int i = 0; i < dim; i += WIDTH) store(y + i, load<Vector>(x + i) * factor * load<Vector>(weight + i));
}

// Turn the pairs (x_i, x_{i + E/2}) by position * frequency_i.
void rotate(float* x, int width, const float* cosine, const float* sine) {
    for (int i = 0; i < width / 2; i++) {
        float a = x[i], b = x[i + width / 2];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + width / 2] = b * cosine[i] + a * sine[i];
    }
}

template <class T>
inline Vector cached(const T* from) {
    if constexpr (sizeof(T) == 4) return load<Vector>(from);
    else return widened(load<Halves>(from));
}

template <class T>
void remember(T* to, const float* from, int width) {
    for (int i = 0; i < width; i++)
        if constexpr (sizeof(T) == 4) to[i] = from[i];
        else to[i] = shortened(from[i]);
}

// The slots that a query sees: all, or the first `sinks` and the last `window`.
struct Seen {
    int count, sinks, gap;
    Seen(int all, int window, int first) : count(all), sinks(all), gap(0) {
        if (window <= 0 || window >= all) return;
        sinks = std::min(first, all - window);
        gap = all - window - sinks;
        count = sinks + window;
    }
    int slot(int i) const { return i < sinks ? i : i + gap; }
};

// softmax(q k^T / sqrt(E)) v of one query.
template <class T>
void attend(const float* q, const T* keys, const T* values, const Seen& seen, int width, float* scores, float* out) {
    float scale = 1 / std::sqrt(float(width)), peak = -INFINITY, total = 0;
    for (int t = 0; t < seen.count; t++) {
        Vector dot = {};
        const T* key = keys + size_t(seen.slot(t)) * width;
        for (int i = 0; i < width; i += WIDTH) dot += load<Vector>(q + i) * cached(key + i);
        scores[t] = sum(dot) * scale;
        peak = std::max(peak, scores[t]);
    }
    for (int t = 0; t < seen.count; t++) total += scores[t] = std::exp(scores[t] - peak);
    for (int i = 0; i < width; i += WIDTH) {
        Vector mean = {};
        for (int t = 0; t < seen.count; t++) mean += scores[t] * cached(values + size_t(seen.slot(t)) * width + i);
        store(out + i, mean / total);
    }
}

struct Share {  // of `count` things, this thread's
    int begin, end;
    Share(int count, int grain = 1) {
        int threads = omp_get_num_threads(), me = omp_get_thread_num(), units = (count + grain - 1) / grain;
        begin = std::min(count, units * me / threads * grain);
        end = std::min(count, units * (me + 1) / threads * grain);
    }
};

// Where the parts of `memory` lie, one row after the other.
struct Memory {
    float *x, *qkv, *heads, *hidden, *turns, *of_thread;
    size_t thread_floats;
    int widest;

    Memory(const Model& m, int slots) {
        int q = m.heads * m.head_dim, all = q + 2 * m.kv_heads * m.head_dim;
        size_t rows = m.max_rows;
        widest = std::max({m.dim, q, m.hidden});
        x = m.memory;
        qkv = x + rows * m.dim;
        heads = qkv + rows * all;
        hidden = heads + rows * q;
        turns = hidden + rows * m.hidden;
        of_thread = turns + rows * m.head_dim;
        thread_floats = rows * (m.dim + widest / 32 + std::max(m.dim, 2 * m.hidden)) + slots + BLOCK * widest;
    }
    size_t floats(const Model& m) const { return size_t(of_thread - m.memory) + m.threads * thread_floats; }
};

template <class T>
void step(const Model& m, int rows, const int64_t* tokens, const int64_t* positions, const Cache* caches, int slots,
          int window, int sinks, float* logits) {
    const int D = m.dim, E = m.head_dim, Q = m.heads * E, KV = m.kv_heads * E, all = Q + 2 * KV, F = m.hidden;
    Memory memory(m, slots);
#pragma omp parallel num_threads(m.threads)
    {
        float* normed = memory.of_thread + omp_get_thread_num() * memory.thread_floats;
        float* sums = normed + size_t(m.max_rows) * D;
        float* made = sums + size_t(m.max_rows) * (memory.widest / 32);
        float* scores = made + size_t(m.max_rows) * std::max(D, 2 * F);
        float* expanded = scores + slots;
        const float *in[m.max_rows], *in_sums[m.max_rows];
        float* out[m.max_rows];

        // Inputs and outputs of the next product: rows of `from`, `width` apart, and of `to`.
        auto between = [&](const float* from, int width, float* to, int to_width) {
            for (int b = 0; b < rows; b++) {
                in[b] = from + size_t(b) * width;
                in_sums[b] = sums + size_t(b) * (memory.widest / 32);
                out[b] = to + size_t(b) * to_width;
            }
        };
        auto summed = [&](const Matrix& matrix) {
            if (matrix.kind != INT4) return;
            for (int b = 0; b < rows; b++) group_sums(in[b], matrix.columns, (float*)in_sums[b]);
        };
        auto normalised = [&](const float* weight) {  // by each thread for itself: sooner than to wait for the others
            for (int b = 0; b < rows; b++) rms_norm(memory.x + size_t(b) * D, weight, D, m.eps, normed + size_t(b) * D);
        };
        auto add_product = [&](const Matrix& matrix, const float* from, int width) {
            Share share(D, 4);
            between(from, width, made, D);
            summed(matrix);
            multiply(matrix, share.begin, share.end, rows, in, in_sums, out, expanded);
            for (int b = 0; b < rows; b++)
                for (int i = share.begin; i < share.end; i++) memory.x[size_t(b) * D + i] += out[b][i];
        };

#pragma omp for
        for (int b = 0; b < rows; b++) {
            float* x = memory.x + size_t(b) * D;
            size_t at = size_t(tokens[b]) * D;
            for (int i = 0; i < D; i++)
                x[i] = m.embedding.kind == FLOAT32 ? ((const float*)m.embedding.weights)[at + i]
                                                   : widened(((const uint16_t*)m.embedding.weights)[at + i]);
            float *cosine = memory.turns + size_t(b) * E, *sine = cosine + E / 2;
            for (int i = 0; i < E / 2; i++) {
                float angle = float(positions[b]) * m.frequencies[i];
                cosine[i] = std::cos(angle);
                sine[i] = std::sin(angle);
            }
        }
        for (int l = 0; l < m.layers; l++) {
            const Layer& layer = m.layer[l];
            T *keys = (T*)caches[l].keys, *values = (T*)caches[l].values;

            normalised(layer.attention_norm);
            between(normed, D, memory.qkv, all);
            summed(layer.qkv);
            Share part(all, 4);
            multiply(layer.qkv, part.begin, part.end, rows, in, in_sums, out, expanded);
#pragma omp barrier
#pragma omp for
            for (int n = 0; n < rows * m.kv_heads; n++) {
                int b = n / m.kv_heads, k = n % m.kv_heads;
                float* key = memory.qkv + size_t(b) * all + Q + k * E;
                const float* cosine = memory.turns + size_t(b) * E;
                rotate(key, E, cosine, cosine + E / 2);
                size_t at = (size_t(n) * slots + positions[b]) * E;
                remember(keys + at, key, E);
                remember(values + at, key + KV, E);
            }
#pragma omp for
            for (int n = 0; n < rows * m.heads; n++) {
                int b = n / m.heads, h = n % m.heads;
                float* q = memory.qkv + size_t(b) * all + h * E;
                const float* cosine = memory.turns + size_t(b) * E;
                rotate(q, E, cosine, cosine + E / 2);
                size_t at = size_t(b * m.kv_heads + h / (m.heads / m.kv_heads)) * slots * E;
                Seen seen(positions[b] + 1, window, sinks);
                attend(q, keys + at, values + at, seen, E, scores, memory.heads + size_t(b) * Q + h * E);
            }
            add_product(layer.output, memory.heads, Q);
#pragma omp barrier
            normalised(layer.mlp_norm);
            between(normed, D, made, 2 * F);
            summed(layer.gate_up);
            Share units(F, 4);
            multiply(layer.gate_up, units.begin, units.end, rows, in, in_sums, out, expanded);
            multiply(layer.gate_up, F + units.begin, F + units.end, rows, in, in_sums, out, expanded);
            for (int b = 0; b < rows; b++)
                for (int i = units.begin; i < units.end; i++) {
                    float gate = out[b][i];
                    memory.hidden[size_t(b) * F + i] = gate / (1 + std::exp(-gate)) * out[b][F + i];
                }
#pragma omp barrier
            add_product(layer.down, memory.hidden, F);
#pragma omp barrier
        }
        normalised(m.norm);
        between(normed, D, logits, m.vocab);
        summed(m.head);
        Share words(m.vocab, 4);
        multiply(m.head, words.begin, words.end, rows, in, in_sums, out, expanded);
    }
}

}  // namespace

extern "C" {

// Floats of `memory` for caches of so many slots.
size_t minillama_floats(const Model* model, int32_t slots) { return Memory(*model, slots).floats(*model); }

// Read a token a row at its position, keep its keys and values, and write logits (rows, V). `short_caches`: of
// bfloat16. `window`: 0 sees everything.
void minillama_step(const Model* model, int32_t rows, const int64_t* tokens, const int64_t* positions, const Cache* caches,
                    int32_t slots, int32_t short_caches, int32_t window, int32_t sinks, float* logits) {
    auto run = short_caches ? step<uint16_t> : step<float>;
    run(*model, rows, tokens, positions, caches, slots, window, sinks, logits);
}
}
