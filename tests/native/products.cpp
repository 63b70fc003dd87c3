// Matrix products of gemv.h beside sums in double of the same weights: prints the largest relative error per format.

#include <cstdio>
#include <random>
#include <vector>

#include "gemv.h"

template <class T>
struct Aligned {
    std::vector<T> memory;
    explicit Aligned(size_t count) : memory(count + 4096 + 64) {}
    T* data() { return (T*)(((uintptr_t)memory.data() + 63) / 64 * 64); }
};

int main() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (int kind = FLOAT32; kind <= INT4; kind++) {
        double worst = 0;
        for (int columns : {32, 64, 224, 256, 576})
            for (int inputs : {1, 2, 4, 7, 12, 16, 33}) {
                const int rows = 61, groups = columns / GROUP;
                Aligned<char> weights(size_t(rows) * columns * 4);
                Aligned<float> x(size_t(inputs) * columns), y(size_t(inputs) * rows), unpacked(size_t(BLOCK) * columns);
                Aligned<int16_t> integers(size_t(inputs) * columns), grid(size_t(rows) * groups * 2);
                Aligned<float> scales(inputs * spans(columns)), sums(inputs * spans(columns) * (SPAN / GROUP));
                std::vector<float> scale(rows), bias(rows);
                std::vector<double> exact(size_t(rows) * columns);
                for (int r = 0; r < rows; r++) {
                    scale[r] = std::exp(normal(random)), bias[r] = normal(random);
                    for (int i = 0; i < columns; i++) {
                        size_t at = size_t(r) * columns + i;
                        int16_t* step = grid.data() + at / GROUP * 2;
                        if (i % GROUP == 0) step[0] = int16_t(5000 * normal(random)), step[1] = int16_t(random() % 2000 - 1000);
                        float w = normal(random);
                        if (kind == FLOAT32) ((float*)weights.data())[at] = w;
                        if (kind == BFLOAT16) ((uint16_t*)weights.data())[at] = f32_to_bf16(w), w = bf16_to_f32(f32_to_bf16(w));
                        if (kind == INT8) w = ((int8_t*)weights.data())[at] = int8_t(random() % 255 - 127);
                        exact[at] = kind < INT8 ? double(w) : double(w) * scale[r];
                        if (kind == INT4) {
                            int nibble = int(random() % 16), place = i % GROUP;
                            auto* byte = (uint8_t*)weights.data() + at / GROUP * 16 + place % 16;
                            *byte = uint8_t(place < 16 ? nibble : *byte | nibble << 4);
                            exact[at] = (std::floor(nibble * double(step[0]) / 16 + 0.5) + step[1]) * scale[r];
                        }
                    }
                }
                for (int i = 0; i < inputs * columns; i++) x.data()[i] = normal(random) * std::exp(normal(random));
                Matrix m = {Kind(kind), rows, columns, weights.data(), scale.data(), grid.data(), bias.data()};
                Inputs in = {x.data(), size_t(columns), inputs, integers.data(), scales.data(), sums.data(), nullptr};
                for (int b = 0; b < inputs && of_integers(m.kind); b++) {
                    const size_t span = size_t(b) * spans(columns);
                    quantize(in.row(b), m, integers.data() + size_t(b) * columns, scales.data() + span,
                             sums.data() + span * (SPAN / GROUP));
                }
                Workspace workspace = {unpacked.data(), nullptr};
                multiply(m, 0, 29, in, {y.data(), rows}, workspace);
                multiply(m, 29, rows, in, {y.data(), rows}, workspace);
                for (int b = 0; b < inputs; b++)
                    for (int r = 0; r < rows; r++) {
                        double sum = bias[r], size = 0;
                        for (int i = 0; i < columns; i++) {
                            double product = exact[size_t(r) * columns + i] * in.row(b)[i];
                            sum += product, size += product * product;
                        }
                        worst = std::max(worst, std::abs(sum - y.data()[size_t(b) * rows + r]) / std::sqrt(size));
                    }
            }
        std::printf("%.3g\n", worst);
    }
}
