// One row of activations that are mostly zero, times an integer linear: only the weights of eight inputs at a time of
// which one is not zero are read. The result is that of `apply`.
#pragma once

#include "linear.h"

struct NonzeroSteps {
    struct Step {
        uint32_t weights;  // where the weights of its eight inputs are in a block, in bytes
        uint32_t input;    // the first of its inputs
    };
    std::vector<Step> steps;
    std::vector<uint32_t> first;  // of each group, and of the end
};

static void find_nonzero(const LinearSpec& w, const Activations& a, NonzeroSteps& to) {
    const int64_t groups = w.inputs / w.group, bytes = group_bytes(w.kind, w.group), wide = w.kind == INT4 ? 16 : 32;
    to.steps.clear();
    to.first.clear();
    for (int64_t g = 0; g < groups; g++) {
        to.first.push_back((uint32_t)to.steps.size());
        for (int64_t k = 0; k < w.group; k += 8) {
            uint64_t eight;
            memcpy(&eight, a.q + g * w.group + k, 8);
            if (eight) to.steps.push_back({(uint32_t)(g * bytes + 2 * BLOCK + k * wide), (uint32_t)(g * w.group + k)});
        }
    }
    to.first.push_back((uint32_t)to.steps.size());
}

template <int KIND>
static void block_nonzero(const LinearSpec& w, int64_t block, const Activations& a, const NonzeroSteps& nonzero, float* out) {
    const int64_t groups = w.inputs / w.group, bytes = group_bytes(KIND, w.group);
    const uint8_t* data = w.data + block * groups * bytes;
    const uint8_t* zeros = KIND == INT4 ? w.zeros + block * groups * BLOCK : nullptr;
    const NonzeroSteps::Step* const last = nonzero.steps.data() + nonzero.steps.size();
    Floats result[VECTORS];
    for (int h = 0; h < VECTORS; h++) result[h] = splat(0.0f);
    for (int64_t g = 0; g < groups; g++) {
        const NonzeroSteps::Step* step = nonzero.steps.data() + nonzero.first[g];
        const NonzeroSteps::Step* const end = nonzero.steps.data() + nonzero.first[g + 1];
        if (step == end && a.scale[g] == 0) continue;  // the scale of a group with NaN in it is NaN
        Ints acc[2][VECTORS];
        for (int h = 0; h < VECTORS; h++) acc[0][h] = acc[1][h] = splat(0);
        for (; step < end; step++) {
            if (last - step > 6) {
                __builtin_prefetch(data + step[6].weights);
                __builtin_prefetch(data + step[6].weights + 64);
            }
            const uint8_t* p = data + step->weights;
            const int32_t low = four(a.q + step->input), high = four(a.q + step->input + 4);
            for (int h = 0; h < VECTORS; h++) {
                if (KIND == INT4) {
                    const Bytes both = load_as<Bytes>(p + 4 * LANES * h);
                    acc[0][h] = dot4<true>(acc[0][h], both & 15, low);
                    acc[1][h] = dot4<true>(acc[1][h], (Bytes)(((Words)both >> 4)) & 15, high);
                } else {
                    acc[0][h] = dot4<false>(acc[0][h], load_as<Bytes>(p + 4 * LANES * h), low);
                    acc[1][h] = dot4<false>(acc[1][h], load_as<Bytes>(p + 128 + 4 * LANES * h), high);
                }
            }
        }
        for (int h = 0; h < VECTORS; h++) {
            const Floats scale = load_half((const uint16_t*)(data + g * bytes) + LANES * h);
            const Floats zero = KIND == INT4 ? load_u8(zeros + g * BLOCK + LANES * h) : splat(128.0f);
            const Floats exact = fma(zero, splat(-a.total[g]), to_float(acc[0][h] + acc[1][h]));
            result[h] = fma(exact, scale * a.scale[g], result[h]);
        }
    }
    memcpy(out + block * BLOCK, &result[0], 4 * std::min<int64_t>(BLOCK, w.outputs - block * BLOCK));
}

// a: one row, quantized; out: [outputs].
static void apply_sparse(Pool& pool, const LinearSpec& w, const Activations& a, NonzeroSteps& nonzero, float* out) {
    find_nonzero(w, a, nonzero);
    const int64_t blocks = blocks_of(w.outputs), step = std::max<int64_t>(1, blocks / (4 * pool.threads()));
    pool.run((blocks + step - 1) / step, [&](int64_t item, int) {
        for (int64_t b = item * step; b < std::min(blocks, (item + 1) * step); b++)
            if (w.kind == INT4) block_nonzero<INT4>(w, b, a, nonzero, out);
            else block_nonzero<INT8>(w, b, a, nonzero, out);
    });
}
