// Attention of new tokens over the cached keys of their row (a ring of slots) and over the new tokens themselves.
#pragma once

#include "held.h"

#include <algorithm>

constexpr int MAX_QUERIES = 8;     // per tile
constexpr int MAX_HEAD_DIM = 512;  // for which a tile has room

// Keys and values of one head at equal distances in memory, as held.h has them.
struct Run {
    const uint8_t* k;
    const uint8_t* v;
    int64_t stride;  // in bytes
    int64_t count;
};

// Scores [Q, keys] of Q queries [Q, D] float32 against the keys of the runs.
template <int Q, int KIND>
static void score(const float* q, int64_t d, const Run* runs, int nruns, float* scores, int64_t keys) {
    constexpr int TOGETHER = Q <= 4 ? 4 : 2;
    int64_t at = 0;
    for (int n = 0; n < nruns; n++) {
        const Run& run = runs[n];
        for (int64_t j = 0; j < run.count; j += TOGETHER) {
            const int many = (int)std::min<int64_t>(TOGETHER, run.count - j);
            Floats acc[Q][TOGETHER];
            const uint8_t* k[TOGETHER];
            for (int t = 0; t < TOGETHER; t++) {
                k[t] = run.k + (j + std::min(t, many - 1)) * run.stride;
                for (int i = 0; i < Q; i++) acc[i][t] = splat(0.0f);
            }
            for (int64_t c = 0; c < d; c += LANES)
                for (int t = 0; t < TOGETHER; t++) {
                    const Floats key = load_held<KIND>(k[t], c, d);
                    for (int i = 0; i < Q; i++) acc[i][t] = fma(load(q + i * d + c), key, acc[i][t]);
                }
            float sums[Q * TOGETHER];
            const int all = Q * TOGETHER;  // a multiple of 4
            for (int n4 = 0; n4 < all; n4 += 4) four_sums(&acc[0][0] + n4, sums + n4);
            for (int i = 0; i < Q; i++)
                for (int t = 0; t < many; t++) scores[i * keys + at + t] = sums[i * TOGETHER + t];
            at += many;
        }
    }
}

// Weights [Q, keys] times the values of the runs: out[i] points to the result [D] of query i.
template <int Q, int KIND>
static void mix(const float* weights, int64_t keys, const Run* runs, int nruns, int64_t d, float* const* out) {
    constexpr int WIDTH = Q <= 4 ? 4 : 2;
    for (int64_t c = 0; c < d; c += LANES * WIDTH) {
        Floats acc[Q][WIDTH];
        for (int i = 0; i < Q; i++)
            for (int w = 0; w < WIDTH; w++) acc[i][w] = splat(0.0f);
        const int64_t at_most = std::min<int64_t>(WIDTH, (d - c) / LANES);
        int64_t at = 0;
        for (int n = 0; n < nruns; n++)
            for (int64_t j = 0; j < runs[n].count; j++, at++) {
                const uint8_t* v = runs[n].v + j * runs[n].stride;
                if (at_most == WIDTH) {
                    for (int w = 0; w < WIDTH; w++) {
                        const Floats value = load_held<KIND>(v, c + LANES * w, d);
                        for (int i = 0; i < Q; i++) acc[i][w] = fma(value, splat(weights[i * keys + at]), acc[i][w]);
                    }
                } else {
                    for (int w = 0; w < at_most; w++) {
                        const Floats value = load_held<KIND>(v, c + LANES * w, d);
                        for (int i = 0; i < Q; i++) acc[i][w] = fma(value, splat(weights[i * keys + at]), acc[i][w]);
                    }
                }
            }
        for (int i = 0; i < Q; i++)
            for (int w = 0; w < at_most; w++) store(out[i] + c + LANES * w, acc[i][w]);
    }
}

// Softmax in place over scores [keys], of which first .. last - 1 are visible; the others get weight 0.
static void softmax(float* scores, int64_t keys, int64_t first, int64_t last, float softcap) {
    for (int64_t j = 0; j < first; j++) scores[j] = 0;
    for (int64_t j = last; j < keys; j++) scores[j] = 0;
    float* s = scores + first;
    const int64_t count = last - first, whole = count & ~(LANES - 1);
    float rest[LANES];
    for (int i = 0; i < LANES; i++) rest[i] = i < count - whole ? s[whole + i] : -INFINITY;
    const auto capped = [&](Floats v) { return softcap > 0 ? soft_cap(v, softcap) : v; };
    Floats tail = load(rest);
    if (softcap > 0) {
        const Floats mask = tail;
        tail = capped(tail);
        tail = mask == splat(-INFINITY) ? mask : tail;
    }
    Floats top = tail;
    for (int64_t j = 0; j < whole; j += LANES) {
        const Floats v = capped(load(s + j));
        store(s + j, v);
        top = larger(top, v);
    }
    const Floats most = splat(largest(top));
    Floats total = splat(0.0f);
    for (int64_t j = 0; j < whole; j += LANES) {
        const Floats e = exponential(load(s + j) - most);
        store(s + j, e);
        total += e;
    }
    tail = exponential(tail - most);
    total += tail;
    const float inverse = 1.0f / sum(total);
    for (int64_t j = 0; j < whole; j += LANES) store(s + j, load(s + j) * inverse);
    for (int64_t i = 0; i < count - whole; i++) s[whole + i] = tail[i] * inverse;
}
