// What a layer computes of each token, or of each number, by itself: for rows that torch holds, in float32 or bf16.
#pragma once

#include "norm.h"
#include "pool.h"

#include <algorithm>
#include <vector>

constexpr int64_t TURN = 1 << 14;  // numbers that a thread takes at a time

// Calls with where the numbers from `from` on begin, as float32, and where their results go, for `count` numbers. bf16
// ones are converted before and after.
template <class Body>
static void on_floats(const void* x, bool narrow, int64_t from, int64_t count, void* out, std::vector<float>& space,
                      const Body& body) {
    if (!narrow) return body((const float*)x + from, (float*)out + from);
    space.resize(count + LANES);
    float* const wide = space.data();
    const uint16_t* const bits = (const uint16_t*)x + from;
    const int64_t whole = count & ~(LANES - 1);
    for (int64_t i = 0; i < whole; i += LANES) store(wide + i, load_bf16(bits + i));
    for (int64_t i = whole; i < count; i++) wide[i] = float_of(bits[i]);
    body(wide, wide);
    uint16_t* const to = (uint16_t*)out + from;
    for (int64_t i = 0; i < whole; i += LANES) store_bf16(to + i, load(wide + i));
    uint16_t last[LANES];
    store_bf16(last, load(wide + whole));
    for (int64_t i = whole; i < count; i++) to[i] = last[i - whole];
}

// out [rows, width] = RMSNorm(x) * gain; gain: null for 1
static void norm_rows(Pool& pool, const void* x, bool narrow, int64_t rows, int64_t width, const float* gain, float eps,
                      void* out) {
    const int64_t turn = std::max<int64_t>(1, TURN / width);
    std::vector<std::vector<float>> spaces(pool.threads());
    pool.run((rows + turn - 1) / turn, [&](int64_t item, int thread) {
        const int64_t first = item * turn, count = std::min(turn, rows - first);
        on_floats(x, narrow, first * width, count * width, out, spaces[thread], [&](const float* from, float* to) {
            for (int64_t r = 0; r < count; r++) rms_norm(from + r * width, gain, width, eps, to + r * width);
        });
    });
}

// out [count] = GELU(x), by tanh
static void gelu_numbers(Pool& pool, const void* x, bool narrow, int64_t count, void* out) {
    std::vector<std::vector<float>> spaces(pool.threads());
    pool.run((count + TURN - 1) / TURN, [&](int64_t item, int thread) {
        const int64_t first = item * TURN, here = std::min(TURN, count - first), whole = here & ~(LANES - 1);
        on_floats(x, narrow, first, here, out, spaces[thread], [&](const float* from, float* to) {
            for (int64_t i = 0; i < whole; i += LANES) store(to + i, gelu_tanh(load(from + i)));
            float last[LANES] = {};
            std::copy(from + whole, from + here, last);
            store(last, gelu_tanh(load(last)));
            std::copy(last, last + (here - whole), to + whole);
        });
    });
}
