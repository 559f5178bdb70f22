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

// out [size] = x with each pair of numbers, one of either half, turned. cos, sin: [size]; out may be x.
static void rotate_pairs(const float* x, const float* cos, const float* sin, int64_t size, float* out) {
    const int64_t half = size / 2, whole = half & ~(LANES - 1);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats a = load(x + i), b = load(x + half + i);
        store(out + i, a * load(cos + i) - b * load(sin + i));
        store(out + half + i, b * load(cos + half + i) + a * load(sin + half + i));
    }
    for (int64_t i = whole; i < half; i++) {
        const float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}

// out [rows, tokens, heads, size] = the heads x, turned by the places of their tokens. strides: numbers in x between two
// rows, two tokens, two heads; cos, sin: [rows or 1, tokens, size], `apart` numbers between two rows, 0 for one.
static void rotate_heads(Pool& pool, const void* x, bool narrow, const int64_t* strides, int64_t rows, int64_t tokens,
                         int64_t heads, int64_t size, const float* cos, const float* sin, int64_t apart, void* out) {
    const int64_t turn = std::max<int64_t>(1, TURN / (heads * size)), turns = (tokens + turn - 1) / turn, bytes = narrow ? 2 : 4;
    std::vector<std::vector<float>> spaces(pool.threads());
    pool.run(rows * turns, [&](int64_t item, int thread) {
        const int64_t row = item / turns, first = item % turns * turn, end = std::min(tokens, first + turn);
        for (int64_t t = first; t < end; t++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t at = row * strides[0] + t * strides[1] + h * strides[2], place = row * apart + t * size;
                const int64_t to = ((row * tokens + t) * heads + h) * size;
                on_floats((const char*)x + at * bytes, narrow, 0, size, (char*)out + to * bytes, spaces[thread],
                          [&](const float* from, float* result) { rotate_pairs(from, cos + place, sin + place, size, result); });
            }
    });
}
