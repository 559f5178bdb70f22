// Attention of new tokens over the cached keys of their row (a ring of slots) and over the new tokens themselves.
//
// Keys are taken in blocks of positions, KEY_BLOCK from a multiple of it on. What a query makes of a block is a softmax
// of its own, and blocks are merged in order, as in flash attention. So a result does not depend on the threads that
// the blocks were given to, nor on what is computed beside it.
#pragma once

#include "held.h"

#include <algorithm>

constexpr int MAX_QUERIES = 8;     // per tile
constexpr int MAX_TILES = 8;       // that meet a block one after the other
constexpr int64_t KEY_BLOCK = 128;
constexpr int MAX_HEAD_DIM = 512;  // for which a tile has room

// Keys and values of one head at equal distances in memory, as held.h has them.
struct Run {
    const uint8_t* k;
    const uint8_t* v;
    int64_t stride;  // in bytes
    int64_t count;
};

// Scores [Q, KEY_BLOCK] of Q queries [D] float32 against the keys of the runs.
template <int Q, int KIND>
static void score(const float* const* q, int64_t d, const Run* runs, int nruns, float* scores) {
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
                    for (int i = 0; i < Q; i++) acc[i][t] = fma(load(q[i] + c), key, acc[i][t]);
                }
            float sums[Q * TOGETHER];
            const int all = Q * TOGETHER;  // a multiple of 4
            for (int n4 = 0; n4 < all; n4 += 4) four_sums(&acc[0][0] + n4, sums + n4);
            for (int i = 0; i < Q; i++)
                for (int t = 0; t < many; t++) scores[i * KEY_BLOCK + at + t] = sums[i * TOGETHER + t];
            at += many;
        }
    }
}

// Weights [Q, KEY_BLOCK] times the values of the runs -> out [Q, D].
template <int Q, int KIND>
static void mix(const float* weights, const Run* runs, int nruns, int64_t d, float* out) {
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
                        for (int i = 0; i < Q; i++) acc[i][w] = fma(value, splat(weights[i * KEY_BLOCK + at]), acc[i][w]);
                    }
                } else {
                    for (int w = 0; w < at_most; w++) {
                        const Floats value = load_held<KIND>(v, c + LANES * w, d);
                        for (int i = 0; i < Q; i++) acc[i][w] = fma(value, splat(weights[i * KEY_BLOCK + at]), acc[i][w]);
                    }
                }
            }
        for (int i = 0; i < Q; i++)
            for (int w = 0; w < at_most; w++) store(out + i * d + c + LANES * w, acc[i][w]);
    }
}

// What a query has seen of some keys: the largest score, the sum of the weights relative to it, and the values [D] mixed
// by these weights in memory of its own. Nothing yet: total 0.
struct Seen {
    float top, total;
};

// Weights in place of the scores [keys], of which first .. last - 1 are visible and at least one; the others get 0.
static Seen weigh(float* scores, int64_t keys, int64_t first, int64_t last, float softcap) {
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
    const float most = largest(top);
    Floats total = splat(0.0f);
    for (int64_t j = 0; j < whole; j += LANES) {
        const Floats e = exponential(load(s + j) - splat(most));
        store(s + j, e);
        total += e;
    }
    tail = exponential(tail - splat(most));
    total += tail;
    for (int64_t i = 0; i < count - whole; i++) s[whole + i] = tail[i];
    return {most, sum(total)};
}

// Adds what a query has seen of the next block, values [D] in `part`, to what it has seen before, values in `values`.
static void merge(Seen& seen, float* values, const Seen& next, const float* part, int64_t d) {
    if (next.total == 0) return;
    if (seen.total == 0) {
        seen = next;
        memcpy(values, part, 4 * d);
        return;
    }
    const float top = seen.top > next.top ? seen.top : next.top;
    const Floats before = exponential(splat(seen.top - top)), now = exponential(splat(next.top - top));
    seen = {top, seen.total * before[0] + next.total * now[0]};
    for (int64_t c = 0; c < d; c += LANES)
        store(values + c, fma(load(values + c), before, load(part + c) * now));
}

// The queries of one kv head that meet the same keys together: q, first and last [count]. Of a block's keys, the query
// n sees first[n] .. last[n] - 1, which may be none.
struct Meeting {
    const float* const* q;
    const int64_t *first, *last;
    int64_t count;
};

template <int Q, int KIND>
static void meet_all(const Meeting& m, int64_t at, const Run* runs, int nruns, int64_t keys, int64_t d, float softcap,
                     Seen* seen, float* values) {
    float scores[Q * KEY_BLOCK];
    score<Q, KIND>(m.q + at, d, runs, nruns, scores);
    for (int i = 0; i < Q; i++) {
        const int64_t first = m.first[at + i], last = m.last[at + i];
        if (first < last) {
            seen[at + i] = weigh(scores + i * KEY_BLOCK, keys, first, last, softcap);
        } else {
            seen[at + i] = {0, 0};
            memset(scores + i * KEY_BLOCK, 0, 4 * keys);
        }
    }
    mix<Q, KIND>(scores, runs, nruns, d, values + at * d);
}

// What each query sees of one block, whose keys are in the runs: seen [count], values [count, D].
template <int KIND>
static void meet(const Meeting& m, const Run* runs, int nruns, int64_t d, float softcap, Seen* seen, float* values) {
    int64_t keys = 0;
    for (int n = 0; n < nruns; n++) keys += runs[n].count;
    // a full tile, or four, two and one queries at a time
    for (int64_t at = 0; at < m.count;) {
        const int64_t left = m.count - at;
        const int many = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (many == 8) meet_all<8, KIND>(m, at, runs, nruns, keys, d, softcap, seen, values);
        else if (many == 4) meet_all<4, KIND>(m, at, runs, nruns, keys, d, softcap, seen, values);
        else if (many == 2) meet_all<2, KIND>(m, at, runs, nruns, keys, d, softcap, seen, values);
        else meet_all<1, KIND>(m, at, runs, nruns, keys, d, softcap, seen, values);
        at += many;
    }
}
