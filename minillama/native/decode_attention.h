// Attention of the decode step: of one query, or of several that share a key/value head.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

template <class T>
inline Vector cached(const T* from) {
    if constexpr (sizeof(T) == 4) return load<Vector>(from);
    else return bf16_to_f32(load<Halves>(from));
}

// Sliding-window mask: all slots, or the first `sinks` (attention sinks) and the last `window`.
struct VisibleSlots {
    int count, sinks, gap;
    VisibleSlots(int all, int window, int first) : count(all), sinks(all), gap(0) {
        if (window <= 0 || window >= all) return;
        sinks = std::min(first, all - window);
        gap = all - window - sinks;
        count = sinks + window;
    }
    int slot(int i) const { return i < sinks ? i : i + gap; }
};

constexpr int CHANNELS = 64 / WIDTH;  // vectors of a head whose means are taken together

// Weighted mean of N vectors of the values.
template <int N, class T>
void mean(const float* weights, const T* values, const VisibleSlots& visible, int width, float inverse, float* out) {
    Vector total[N] = {};
    for (int t = 0; t < visible.count; t++) {
        const T* value = values + size_t(visible.slot(t)) * width;
        for (int n = 0; n < N; n++) total[n] += weights[t] * cached(value + n * WIDTH);
    }
    for (int n = 0; n < N; n++) store(out + n * WIDTH, total[n] * inverse);
}

// Attention softmax(q k^T / sqrt(E)) v of one query.
template <class T>
void attend(const float* q, const T* keys, const T* values, const VisibleSlots& visible, int width, float* scores, float* out) {
    float scale = 1 / std::sqrt(float(width)), peak = -INFINITY;
    auto key = [&](int t) { return keys + size_t(visible.slot(t)) * width; };
    int t = 0;
    for (; t + 4 <= visible.count; t += 4) {
        const T* four[4] = {key(t), key(t + 1), key(t + 2), key(t + 3)};
        Vector dots[4] = {};
        for (int i = 0; i < width; i += WIDTH) {
            Vector part = load<Vector>(q + i);
            for (int n = 0; n < 4; n++) dots[n] += part * cached(four[n] + i);
        }
        store(scores + t, sums(dots) * scale);
    }
    for (; t < visible.count; t++) {
        Vector dot = {};
        for (int i = 0; i < width; i += WIDTH) dot += load<Vector>(q + i) * cached(key(t) + i);
        scores[t] = sum(dot) * scale;
    }
    for (t = 0; t < visible.count; t++) peak = std::max(peak, scores[t]);
    Vector all = {};
    store(scores + visible.count, Vector{} - INFINITY);
    for (t = 0; t < visible.count; t += WIDTH) {
        Vector e = exp(load<Vector>(scores + t) - peak);
        store(scores + t, e);
        all += e;
    }
    float inverse = 1 / sum(all);
    int i = 0;
    for (; i + CHANNELS * WIDTH <= width; i += CHANNELS * WIDTH)
        mean<CHANNELS>(scores, values + i, visible, width, inverse, out + i);
    for (; i < width; i += WIDTH) mean<1>(scores, values + i, visible, width, inverse, out + i);
}

constexpr int QUERIES = 16, CHUNK = 128;   // queries at once, and slots whose scores are held at once
constexpr int HELD = CHUNK + WIDTH;       // floats per query
constexpr int QUERY_TILE = 3, CHANNEL_TILE = 4;  // queries in registers, beside four keys or so many vectors of values

// A query that sees the first `count` slots.
struct Query {
    const float* q;
    float* out;
    int count;
    float peak = -INFINITY, total = 0;
};

// Scores of N queries and `count` keys.
template <int N, class T>
void score(const Query* queries, const T* keys, int width, int count, float scale, float* scores) {
    for (int t = 0; t < count; t += 4) {
        const T* four[4];
        for (int n = 0; n < 4; n++) four[n] = keys + size_t(std::min(t + n, count - 1)) * width;
        Vector dots[N][4] = {};
        for (int i = 0; i < width; i += WIDTH) {
            Vector q[N];
            for (int r = 0; r < N; r++) q[r] = load<Vector>(queries[r].q + i);
            for (int n = 0; n < 4; n++) {
                Vector key = cached(four[n] + i);
                for (int r = 0; r < N; r++) dots[r][n] += q[r] * key;
            }
        }
        for (int r = 0; r < N; r++) store(scores + r * HELD + t, sums(dots[r]) * scale);
    }
}

// Values of `count` slots times the weights of N queries, M vectors of channels from `i` on, added up.
template <int N, int M, class T>
void add_values(const Query* queries, const T* values, int width, int count, const float* weights, int i) {
    Vector total[N][M];
    for (int r = 0; r < N; r++)
        for (int c = 0; c < M; c++) total[r][c] = load<Vector>(queries[r].out + i + c * WIDTH);
    for (int t = 0; t < count; t++)
        for (int c = 0; c < M; c++) {
            Vector value = cached(values + size_t(t) * width + i + c * WIDTH);
            for (int r = 0; r < N; r++) total[r][c] += weights[r * HELD + t] * value;
        }
    for (int r = 0; r < N; r++)
        for (int c = 0; c < M; c++) store(queries[r].out + i + c * WIDTH, total[r][c]);
}

template <int N, class T>
void add_values(const Query* queries, const T* values, int width, int count, const float* weights) {
    int i = 0;
    for (; i + CHANNEL_TILE * WIDTH <= width; i += CHANNEL_TILE * WIDTH)
        add_values<N, CHANNEL_TILE>(queries, values, width, count, weights, i);
    for (; i < width; i += WIDTH) add_values<N, 1>(queries, values, width, count, weights, i);
}

// Online softmax: weights e^(score - peak) of a query in place, 0 where it does not see; its sums so far are rescaled.
inline void update_softmax(Query& query, int start, int count, int width, float* scores) {
    int seen = std::clamp(query.count - start, 0, count);
    if (seen > 0) {
        float peak = query.peak;
        for (int t = 0; t < seen; t++) peak = std::max(peak, scores[t]);
        float factor = std::exp(query.peak - peak);
        store(scores + seen, Vector{} - INFINITY);
        Vector all = {};
        for (int t = 0; t < seen; t += WIDTH) {
            Vector e = exp(load<Vector>(scores + t) - peak);
            store(scores + t, e);
            all += e;
        }
        if (factor != 1)
            for (int i = 0; i < width; i += WIDTH) store(query.out + i, load<Vector>(query.out + i) * factor);
        query.total = query.total * factor + sum(all);
        query.peak = peak;
    }
    std::fill(scores + seen, scores + count, 0.0f);
}

// Attention of a block of up to QUERIES queries, by the online softmax (FlashAttention, Dao et al. 2022, arXiv 2205.14135).
template <class T>
void attend_block(Query* queries, int rows, const T* keys, const T* values, int width, float* scores) {
    auto each = [&](auto work) LAMBDA {  // tiles of queries
        int r = 0;
        for (; r + QUERY_TILE <= rows; r += QUERY_TILE) work(std::integral_constant<int, QUERY_TILE>(), r);
        for (; r < rows; r++) work(std::integral_constant<int, 1>(), r);
    };
    int longest = 0;
    for (int r = 0; r < rows; r++) {
        longest = std::max(longest, queries[r].count);
        std::fill(queries[r].out, queries[r].out + width, 0.0f);
    }
    const float scale = 1 / std::sqrt(float(width));
    for (int start = 0; start < longest; start += CHUNK) {
        const int count = std::min(CHUNK, longest - start);
        const size_t from = size_t(start) * width;
        each([&](auto n, int r) LAMBDA { score<n>(queries + r, keys + from, width, count, scale, scores + r * HELD); });
        for (int r = 0; r < rows; r++) update_softmax(queries[r], start, count, width, scores + r * HELD);
        each([&](auto n, int r) LAMBDA { add_values<n>(queries + r, values + from, width, count, scores + r * HELD); });
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i += WIDTH) {
            float* out = queries[r].out + i;
            store(out, load<Vector>(out) / queries[r].total);
        }
}
}
