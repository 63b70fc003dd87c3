// Batched matrix-vector product y = W x + b. Each weight is read once; floating-point formats are multiplied in float32,
// those of integers in integers, with the inputs in 15 bits per span of columns.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "gemm_amx.h"
#include "matrix.h"

namespace {

constexpr int BLOCK = 24;          // weight rows per block, which stay in the cache for all inputs
constexpr int SPAN = WIDTH == 4 ? 128 : 256;   // columns with a scale of their own: sums of 32 products of 13 bits fit 32
constexpr int LARGEST = (1 << 13) - 1;
constexpr int LINE = 64;           // bytes of a cache line
constexpr int AHEAD = 4096;        // bytes from a weight to the one that is fetched
constexpr int MANY = 4;            // inputs from which on weights are unpacked once for all
constexpr int ROWS = REGISTERS == 32 ? 4 : 3;  // of a tile with 4 inputs: sums, weights and an input fit the registers

// Whether a single row of floating-point weights, read in the order of memory, is prefetched too. Measured in bfloat16:
// a sixth to a third faster on a Xeon, whose hardware prefetcher stops at the end of a page, a quarter slower on Zen 4.
#ifdef __x86_64__
inline bool is_intel() {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
}
const bool PREFETCHES_ROW = is_intel();
#else
constexpr bool PREFETCHES_ROW = false;
#endif

inline int spans(int columns) { return (columns + SPAN - 1) / SPAN; }

template <Kind kind, size_t... r>
std::array<Row<kind>, sizeof...(r)> rows_from(const Matrix& m, int row, std::index_sequence<r...>) {
    return {Row<kind>(m, row + int(r))...};
}

template <Kind kind, int R>
struct Rows : std::array<Row<kind>, R> {
    Rows(const Matrix& m, int row) : std::array<Row<kind>, R>(rows_from<kind>(m, row, std::make_index_sequence<R>())) {}

    // Prefetch, when columns from `k` on are multiplied, of as many bytes behind these rows in the order of memory: rows
    // are short, the hardware prefetcher stops at the end of one, and several streams are slower than one.
    void prefetch(int k, int columns) const {
        const char* from = (*this)[0].weights + AHEAD + long(k) * bits(kind) / 8 * R;
        for (int i = 0; i < columns * bits(kind) / 8 * R; i += LINE) __builtin_prefetch(from + i);
    }
};

template <class F, int... n>
INLINE void unrolled(F f, std::integer_sequence<int, n...>) {
    (f(std::integral_constant<int, n>()), ...);
}

// f(0), f(1), ... f(N - 1) with constants, so that what they index stays in registers.
template <int N, class F>
INLINE void unrolled(F f) {
    unrolled(f, std::make_integer_sequence<int, N>());
}

// So many sums per weight row and input that no addition waits for the one before.
constexpr int chains(int R, int B) { return R * B >= 4 ? 1 : 4 / (R * B); }

// Matrix product of R weight rows with B inputs, from input `first` on, in float32.
template <Kind kind, int R, int B>
inline void tile_floats(const Matrix& m, int row, const Inputs& in, int first, Vector (&total)[R][B]) {
    constexpr int U = chains(R, B), STEP = std::max(4 * WIDTH, LINE * 8 / bits(kind));
    Rows<kind, R> w(m, row);
    Vector sums[U][R][B] = {};
    const float* inputs = in.row(first);
    const size_t width = in.width;
    const bool prefetches = first == 0 && (R > 1 || PREFETCHES_ROW);
    auto add = [&](int i, Vector (&sums)[R][B]) LAMBDA {
        Vector weights[R];
        for (int r = 0; r < R; r++) weights[r] = w[r].floats(i);
        for (int b = 0; b < B; b++) {
            Vector x = load<Vector>(inputs + b * width + i);
            keep(x);
            for (int r = 0; r < R; r++) sums[r][b] += weights[r] * x;
        }
    };
    int i = 0;
    for (; i + STEP <= m.columns; i += STEP) {
        if (prefetches) w.prefetch(i, STEP);
        unrolled<STEP / WIDTH>([&](auto n) LAMBDA { add(i + n * WIDTH, sums[n % U]); });
    }
    for (; i < m.columns; i += WIDTH) add(i, sums[0]);
    for (int u = 0; u < U; u++)
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) total[r][b] += sums[u][r][b];
}

// The same for integers of 8 and 16 bits.
template <Kind kind, int R, int B>
inline void tile_integers(const Matrix& m, int row, const Inputs& in, int first, Vector (&total)[R][B]) {
    constexpr int U = chains(R, B), N = 2 * WIDTH;
    const int columns = m.columns, count = spans(columns);
    const int16_t* inputs = in.integers + size_t(first) * columns;
    Rows<kind, R> w(m, row);
    for (int s = 0, i = 0; s < count; s++) {
        Ints sums[U][R][B] = {};
        auto add = [&](Ints (&sums)[R][B]) LAMBDA {
            unrolled<GROUP / N>([&](auto n) LAMBDA {
                Shorts weights[R];
                unrolled<R>([&](auto r) LAMBDA {
                    weights[r] = w[r].integers(i + n * N);
                    keep(weights[r]);
                });
                unrolled<B>([&](auto b) LAMBDA {
                    Shorts x = load<Shorts>(inputs + size_t(b) * columns + i + n * N);
                    unrolled<R>([&](auto r) LAMBDA { sums[r][b] = dot(sums[r][b], weights[r], x); });
                });
            });
            i += GROUP;
        };
        if (first == 0) w.prefetch(i, SPAN);
        if (i + SPAN <= columns) unrolled<SPAN / GROUP>([&](auto turn) LAMBDA { add(sums[turn % U]); });
        else
            while (i < columns) add(sums[0]);
        for (int b = 0; b < B; b++)
            for (int r = 0; r < R; r++) {
                for (int u = 1; u < U; u++) sums[0][r][b] += sums[u][r][b];
                total[r][b] += __builtin_convertvector(sums[0][r][b], Vector) * in.scales[(first + b) * count + s];
            }
    }
}

// A row of INT4 with one input: (u s / 16 + z) x is summed as s / 16 times the sum of u x, and z times that of x, per
// group. `offset` takes the second.
inline Vector row_int4(const Matrix& m, int row, const Inputs& in, int b, float& offset) {
    constexpr int N = 2 * WIDTH, GROUPS = SPAN / GROUP;
    typedef int32_t Grid __attribute__((vector_size(4 * GROUPS)));
    typedef Floats<GROUPS>::type Scales;
    const int columns = m.columns, count = spans(columns);
    const int16_t* inputs = in.integers + size_t(b) * columns;
    Rows<INT4, 1> w(m, row);
    Vector total = {};
    Scales offsets = {};
    for (int s = 0; s < count; s++) {
        const float unit = in.scales[b * count + s];
        Grid pairs = load<Grid>(w[0].grid + 2 * GROUPS * s);
        float scales[GROUPS];
        store(scales, __builtin_convertvector(pairs << 16 >> 16, Scales));
        offsets += __builtin_convertvector(pairs >> 16, Scales) * load<Scales>(in.sums + (b * count + s) * GROUPS) * unit;
        Vector sums[2] = {};
        const char* weights = w[0].weights + long(s) * SPAN / 2;
        const int16_t* x = inputs + long(s) * SPAN;
        auto add = [&](int g, Vector& sum) LAMBDA {
            Pairs bytes = whole(load<Nibbles>(weights + g * GROUP / 2));
            Shorts nibbles[GROUP / N];
            join(bytes & 15, bytes >> 4, nibbles);
            Ints dots = {};
            unrolled<GROUP / N>([&](auto n) LAMBDA { dots = dot(dots, nibbles[n], load<Shorts>(x + g * GROUP + n * N)); });
            sum += __builtin_convertvector(dots, Vector) * scales[g];
        };
        w.prefetch(s * SPAN, SPAN);
        if ((s + 1) * SPAN <= columns) unrolled<GROUPS>([&](auto g) LAMBDA { add(g, sums[g % 2]); });
        else
            for (int g = 0; s * SPAN + g * GROUP < columns; g++) add(g, sums[0]);
        total += (sums[0] + sums[1]) * (unit / 16);
    }
    for (int g = 0; g < GROUPS; g++) offset += offsets[g];
    return total;
}

template <Kind kind, int R, int B>
inline void tile(const Matrix& m, int row, const Inputs& in, int first, const Outputs& out) {
    Vector total[R][B] = {};
    float offset = 0;
    if constexpr (kind == INT4) total[0][0] = row_int4(m, row, in, first, offset);
    else if constexpr (of_integers(kind)) tile_integers<kind>(m, row, in, first, total);
    else tile_floats<kind>(m, row, in, first, total);
    for (int r = 0; r < R; r++) {
        float y[B], scale = of_integers(kind) ? m.scale[row + r] : 1, bias = m.bias ? m.bias[row + r] : 0;
        if constexpr (B % 4 == 0)
            for (int b = 0; b < B; b += 4) store(y + b, sums(total[r] + b) * scale + bias);
        else
            for (int b = 0; b < B; b++) y[b] = (sum(total[r][b]) + offset) * scale + bias;
        for (int b = 0; b < B; b++) out.row(first + b)[row + r] = y[b];
    }
}

// All rows from `begin` to `end` with B inputs.
template <Kind kind, int R, int B>
void some_inputs(const Matrix& m, int begin, int end, const Inputs& in, int first, const Outputs& out) {
    int row = begin;
    for (; row + R <= end; row += R) tile<kind, R, B>(m, row, in, first, out);
    for (; row < end; row++) tile<kind, 1, B>(m, row, in, first, out);
}

template <Kind kind>
void all_inputs(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out) {
    int b = 0;
    if constexpr (REGISTERS == 32 && !of_integers(kind))
        for (; b + 8 <= in.count; b += 8) some_inputs<kind, 2, 8>(m, begin, end, in, b, out);
    if constexpr (kind != INT4)
        for (; b + 4 <= in.count; b += 4) some_inputs<kind, ROWS, 4>(m, begin, end, in, b, out);
    for (; b < in.count; b++) some_inputs<kind, 1, 1>(m, begin, end, in, b, out);
}

// Matrix product of INT4 rows unpacked to INT16.
void unpacked_product(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out, void* unpacked) {
    for (int row = begin; row < end; row++) {
        Rows<INT4, 1> from(m, row);
        int16_t* to = (int16_t*)unpacked + size_t(row - begin) * m.columns;
        for (int i = 0; i < m.columns; i += GROUP) {
            if (i % (LINE * 2) == 0) from.prefetch(i, LINE * 2);
            Shorts weights[GROUP / (2 * WIDTH)];
            from[0].group(i, weights);
            std::memcpy(to + i, weights, sizeof weights);
        }
    }
    const float* bias = m.bias ? m.bias + begin : nullptr;
    Matrix block = {INT16, end - begin, m.columns, unpacked, m.scale + begin, nullptr, bias};
    all_inputs<INT16>(block, 0, end - begin, in, {out.y + begin, out.width});
}

template <Kind kind>
void product(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out, void* unpacked) {
    if (in.count == 1) return some_inputs<kind, 1, 1>(m, begin, end, in, 0, out);
    if constexpr (kind != FLOAT32)
        if (in.parts) begin = multiply_with_tiles<kind>(m, begin, end, in, out);
    for (int row = begin; row < end; row += BLOCK) {
        int stop = std::min(row + BLOCK, end);
        if (kind == INT4 && in.count >= MANY) unpacked_product(m, row, stop, in, out, unpacked);
        else all_inputs<kind>(m, row, stop, in, out);
    }
}

// Workspace of a thread.
struct Workspace {
    void* unpacked;
    uint32_t* parts;
};

// An input in integers: q = round(x / s), s = max |x| / largest per span. NaN and infinity make s NaN.
// `sums`, or null, takes the sums of q per group.
void quantize(const float* x, const Matrix& m, int16_t* q, float* scales, float* sums) {
    const float largest = m.kind == INT8 ? 0x7fff : LARGEST;  // weights of 8 bits leave room
    for (int s = 0; s < spans(m.columns); s++, x += SPAN, q += SPAN) {
        int count = std::min(SPAN, m.columns - s * SPAN);
        Vector most = {}, zero = {};
        for (int i = 0; i < count; i += WIDTH) {
            Vector v = load<Vector>(x + i), size = (Vector)((Words)v & 0x7fffffff);
            most = size > most ? size : most;
            zero += v * 0;
        }
        float peak = most[0];
        for (int i = 1; i < WIDTH; i++) peak = std::max(peak, most[i]);
        float inverse = peak > 0 ? largest / peak : 0;
        for (int i = 0; i < count; i++) q[i] = int16_t(int32_t(x[i] * inverse + 32768.5f) - 32768);
        scales[s] = peak / largest + sum(zero);
        for (int i = 0; sums && i < SPAN; i += GROUP) {
            Ints total = {};
            for (int n = i; n < i + GROUP && n < count; n += 2 * WIDTH) total = dot(total, load<Shorts>(q + n), Shorts{} + 1);
            *sums++ = sum(__builtin_convertvector(total, Vector));
        }
    }
}

// Rows `begin` to `end` of y = W x + b for every input.
void multiply(const Matrix& m, int begin, int end, const Inputs& in, const Outputs& out, const Workspace& workspace) {
    if (!in.count) return;
    switch (m.kind) {
        case FLOAT32: return product<FLOAT32>(m, begin, end, in, out, workspace.unpacked);
        case BFLOAT16: return product<BFLOAT16>(m, begin, end, in, out, workspace.unpacked);
        case INT8: return product<INT8>(m, begin, end, in, out, workspace.unpacked);
        case INT4: return product<INT4>(m, begin, end, in, out, workspace.unpacked);
        case INT16: return;  // of blocks of INT4 alone
    }
}

}  // namespace
