// Linears whose activations are mostly zero. Weights lie input by input, so that those of a zero are never read; sums
// inside a group are exact integers, and results are those of the layout of linear.h.
//
// Layout of INT4_BY_INPUT, for K inputs in groups of g and N outputs, padded to a multiple of 128: `data` is the scales
// [K / g, N] in float16, then the weights [K, N / 2] bytes. A register of 16-bit words holds 8 LANES outputs: word
// 2 lane + j has output LANES (2 i + j) + lane of them in its nibble i. `zeros`: [K / g, N] bytes.
#pragma once

#include "linear.h"

constexpr int64_t PADDED = 128;

typedef int16_t Halves __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfWords __attribute__((vector_size(4 * LANES)));

INLINE int64_t padded_outputs(int64_t outputs) { return (outputs + PADDED - 1) / PADDED * PADDED; }

// The inputs that are not zero.
struct Nonzero {
    std::vector<uint32_t> inputs;  // [rows, K]: those of each row first
    std::vector<uint32_t> first;   // [rows, K / activation_group + 1]: where those of each scale begin, and the end
};

static void find_nonzero(const LinearSpec& w, const Activations& a, int64_t row, Nonzero& to) {
    const int64_t runs = w.inputs / w.activation_group;
    const int8_t* q = a.q + row * w.inputs;
    uint32_t* inputs = &to.inputs[row * w.inputs];
    uint32_t* first = &to.first[row * (runs + 1)];
    uint32_t count = 0;
    for (int64_t n = 0; n < runs; n++) {
        first[n] = count;
        for (int64_t k = n * w.activation_group; k < (n + 1) * w.activation_group; k += 8) {
            uint64_t eight;
            memcpy(&eight, q + k, 8);
            if (!eight) continue;
            for (int64_t i = k; i < k + 8; i++) {
                inputs[count] = (uint32_t)i;
                count += q[i] != 0;
            }
        }
    }
    first[runs] = count;
}

// One row against T registers of outputs from `tile` on.
template <int T>
static void by_input(const LinearSpec& w, int64_t tile, const Activations& a, int64_t row, const Nonzero& nonzero, float* out) {
    constexpr int SAFE = 16;  // products of 4 and 8 bits whose sum fits 16
    constexpr int AHEAD = 8;
    const int64_t groups = w.inputs / w.group, padded = padded_outputs(w.outputs), at = tile * 8 * LANES;
    const uint16_t* scales = (const uint16_t*)w.data + at;
    const uint8_t* weights = w.data + groups * padded * 2 + at / 2;
    const uint8_t* zeros = w.zeros + at;
    const int8_t* q = a.q + row * w.inputs;
    const uint32_t* inputs = &nonzero.inputs[row * w.inputs];
    const int64_t runs = w.inputs / w.activation_group, runs_of_group = w.group / w.activation_group;
    const uint32_t* first = &nonzero.first[row * (runs + 1)];
    const float* scale_of = a.scale + row * runs;
    const uint32_t last = first[runs];
    Floats result[T][8];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < 8; v++) result[t][v] = splat(0.0f);
    for (int64_t g = 0; g < groups; g++) {
        Floats sums[T][8];
        for (int t = 0; t < T; t++)
            for (int v = 0; v < 8; v++) sums[t][v] = splat(0.0f);
        bool some = false;
        for (int64_t n = g * runs_of_group; n < (g + 1) * runs_of_group; n++) {
            if (first[n] == first[n + 1] && scale_of[n] == 0) continue;  // the scale of NaN is NaN
            some = true;
            Floats dots[T][8];
            for (int t = 0; t < T; t++)
                for (int v = 0; v < 8; v++) dots[t][v] = splat(0.0f);
            for (uint32_t i = first[n]; i < first[n + 1];) {
                Halves acc[T][4];
                for (int t = 0; t < T; t++)
                    for (int k = 0; k < 4; k++) acc[t][k] = Halves{};
                for (const uint32_t end = std::min(first[n + 1], i + SAFE); i < end; i++) {
                    const uint8_t* ahead = weights + (int64_t)inputs[std::min(i + AHEAD, last - 1)] * (padded / 2);
                    for (int t = 0; t < 4 * LANES * T; t += 64) __builtin_prefetch(ahead + t);
                    const uint8_t* from = weights + (int64_t)inputs[i] * (padded / 2);
                    const Halves x = Halves{} + (int16_t)q[inputs[i]];
                    for (int t = 0; t < T; t++) {
                        const HalfWords four_each = load_as<HalfWords>(from + 4 * LANES * t);
                        for (int k = 0; k < 4; k++) acc[t][k] += (Halves)(four_each >> (4 * k) & 15) * x;
                    }
                }
                for (int t = 0; t < T; t++)
                    for (int k = 0; k < 4; k++) {
                        const Ints both = (Ints)acc[t][k];
                        dots[t][2 * k] += to_float((Ints)((Words)both << 16) >> 16);
                        dots[t][2 * k + 1] += to_float(both >> 16);
                    }
            }
            for (int t = 0; t < T; t++)
                for (int v = 0; v < 8; v++) sums[t][v] = fma(dots[t][v], splat(scale_of[n]), sums[t][v]);
        }
        if (!some) continue;
        const Floats total = splat(-a.total[row * groups + g]);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < 8; v++) {
                const int64_t n = g * padded + (8 * t + v) * LANES;
                result[t][v] = fma(fma(load_u8(zeros + n), total, sums[t][v]), load_half(scales + n), result[t][v]);
            }
    }
    memcpy(out + at, &result[0][0], 4 * std::min<int64_t>(T * 8 * LANES, w.outputs - at));
}

// a: quantized; out: [rows, outputs].
static void apply_by_input(Pool& pool, const LinearSpec& w, const Activations& a, Nonzero& nonzero, float* out) {
    const int64_t tiles = (w.outputs + 8 * LANES - 1) / (8 * LANES);
    if ((int64_t)nonzero.inputs.size() < a.rows * w.inputs) nonzero.inputs.resize(a.rows * w.inputs);
    const int64_t lists = a.rows * (w.inputs / w.activation_group + 1);
    if ((int64_t)nonzero.first.size() < lists) nonzero.first.resize(lists);
    pool.run(a.rows, [&](int64_t row, int) { find_nonzero(w, a, row, nonzero); });
    // For one row, long runs of an input's weights; for many, few enough weights to stay in the cache.
    const int64_t step = a.rows > 1 || tiles < 8 * pool.threads() ? 1 : 4;
    pool.run((tiles + step - 1) / step, [&](int64_t item, int) {
        for (int64_t row = 0; row < a.rows; row++) {
            float* to = out + row * w.outputs;
            if (step == 4 && item * 4 + 4 <= tiles) by_input<4>(w, item * 4, a, row, nonzero, to);
            else for (int64_t t = item * step; t < std::min(tiles, (item + 1) * step); t++) by_input<1>(w, t, a, row, nonzero, to);
        }
    });
}

// qweight [K, N/8], qzeros [K/g, N/8] int32, scales [K/g, N] float16 -> `data` and `zeros`.
static void pack_by_input(Pool& pool, const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales,
                          int64_t inputs, int64_t outputs, int64_t group, uint8_t* data, uint8_t* zeros) {
    static const int column[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // that nibble i holds
    const int64_t groups = inputs / group, padded = padded_outputs(outputs), words = outputs / 8;
    pool.run(groups, [&](int64_t g, int) {
        memset(data + g * padded * 2, 0, padded * 2);
        memcpy(data + g * padded * 2, scales + g * outputs, 2 * outputs);
        memset(zeros + g * padded, 0, padded);
        for (int64_t n = 0; n < outputs; n++) {
            const int64_t word = n / 8;
            int nibble = 0;
            while (column[nibble] != n % 8) nibble++;
            zeros[g * padded + n] = qzeros[g * words + word] >> (4 * nibble) & 15;
        }
        for (int64_t k = g * group; k < (g + 1) * group; k++) {
            uint8_t* to = data + groups * padded * 2 + k * (padded / 2);
            memset(to, 0, padded / 2);
            for (int64_t word = 0; word < words; word++) {
                const uint32_t eight = qweight[k * words + word];
                for (int nibble = 0; nibble < 8; nibble++) {
                    const int64_t n = 8 * word + column[nibble], in_tile = n % (8 * LANES);
                    const int64_t i = in_tile / (2 * LANES), j = in_tile / LANES % 2, lane = in_tile % LANES;
                    const uint32_t q = eight >> (4 * nibble) & 15;
                    to[(n - in_tile) / 2 + 2 * (2 * lane + j) + i / 2] |= (uint8_t)(q << (4 * (i % 2)));
                }
            }
        }
    });
}
