// The loops over columns of compensated rounding and of coordinate descent (awq/gptq.py, awq/coordinate_descent.py), for
// some rows of the weight at a time. Here a column is a row of memory: all arrays are [columns, rows] unless said.
#pragma once

#include "pool.h"
#include "vec.h"

#include <algorithm>

constexpr int SPREAD = 4;                           // registers of rows that are walked together
constexpr int64_t STRIP = (int64_t)SPREAD * LANES;  // rows in them
constexpr float LARGEST = 15.0f;                    // of the integers

// To the nearest integer, ties to even: of numbers of at most 2^22, and of larger ones something as large.
INLINE Floats nearest(Floats x) {
    const Floats shift = splat(12582912.0f);
    return (x + shift) - shift;
}

// Rows that are fewer than a strip are copied, so that a register never reads or writes beyond them.
struct Strip {
    int64_t first, count;
    inline __attribute__((always_inline)) void read(const float* from, Floats* to) const {
        if (count == STRIP) {
            UNROLL for (int v = 0; v < SPREAD; v++) to[v] = load(from + first + v * LANES);
            return;
        }
        float copy[STRIP];
        for (int64_t i = 0; i < STRIP; i++) copy[i] = i < count ? from[first + i] : 1.0f;
        UNROLL for (int v = 0; v < SPREAD; v++) to[v] = load(copy + v * LANES);
    }
    inline __attribute__((always_inline)) void write(const Floats* from, float* to) const {
        if (count == STRIP) {
            UNROLL for (int v = 0; v < SPREAD; v++) store(to + first + v * LANES, from[v]);
            return;
        }
        float copy[STRIP];
        UNROLL for (int v = 0; v < SPREAD; v++) store(copy + v * LANES, from[v]);
        std::copy(copy, copy + count, to + first);
    }
};

// sums += row of `count` factors times what `done` holds of as many columns.
INLINE void add_up(const float* factors, const float* done, int64_t count, Floats* sums) {
    for (int64_t j = 0; j < count; j++) {
        const Floats factor = splat(factors[j]);
        UNROLL for (int v = 0; v < SPREAD; v++) sums[v] = fma(factor, load(done + j * STRIP + v * LANES), sums[v]);
    }
}

// See round_columns_in_torch. near: [columns, columns], row i of which holds what the errors of the columns before i do
// to it; work becomes the errors, q the integers.
static void round_columns(Pool& pool, const float* target, float* work, float* q, const float* near, const float* scale,
                          const float* zero, const int64_t* group_of, int64_t columns, int64_t rows) {
    std::vector<float> spaces(pool.threads() * columns * STRIP);
    pool.run((rows + STRIP - 1) / STRIP, [&](int64_t item, int thread) {
        const Strip strip{item * STRIP, std::min(STRIP, rows - item * STRIP)};
        float* const errors = spaces.data() + thread * columns * STRIP;
        for (int64_t c = 0; c < columns; c++) {
            Floats wanted[SPREAD], own[SPREAD], step[SPREAD], middle[SPREAD], before[SPREAD], whole[SPREAD], error[SPREAD];
            strip.read(target + c * rows, wanted);
            strip.read(work + c * rows, own);
            strip.read(scale + group_of[c] * rows, step);
            strip.read(zero + group_of[c] * rows, middle);
            UNROLL for (int v = 0; v < SPREAD; v++) before[v] = splat(0.0f);
            add_up(near + c * columns, errors, c, before);
            UNROLL for (int v = 0; v < SPREAD; v++) {
                const Floats place = nearest((wanted[v] - before[v]) / step[v] + middle[v]);
                whole[v] = smaller(larger(place, splat(0.0f)), splat(LARGEST));
                error[v] = (whole[v] - middle[v]) * step[v] - own[v];
                store(errors + c * STRIP + v * LANES, error[v]);
            }
            strip.write(whole, q + c * rows);
            strip.write(error, work + c * rows);
        }
    });
}

// See move_columns_in_torch. near: [columns, columns], symmetric.
static void move_columns(Pool& pool, const float* slope, float* integers, float* error, const float* near,
                         const float* scale, const float* inverse, const float* curvature, const int64_t* group_of,
                         int64_t columns, int64_t rows) {
    std::vector<float> spaces(pool.threads() * columns * STRIP);
    pool.run((rows + STRIP - 1) / STRIP, [&](int64_t item, int thread) {
        const Strip strip{item * STRIP, std::min(STRIP, rows - item * STRIP)};
        float* const moves = spaces.data() + thread * columns * STRIP;
        for (int64_t c = 0; c < columns; c++) {
            Floats sum[SPREAD], before[SPREAD], step[SPREAD], back[SPREAD], left[SPREAD], move[SPREAD];
            strip.read(slope + c * rows, sum);
            strip.read(integers + c * rows, before);
            strip.read(scale + group_of[c] * rows, step);
            strip.read(inverse + group_of[c] * rows, back);
            strip.read(error + c * rows, left);
            add_up(near + c * columns, moves, c, sum);
            const bool still = !(curvature[c] > 0);
            const Floats bend = splat(still ? 0.0f : -1.0f / curvature[c]);
            UNROLL for (int v = 0; v < SPREAD; v++) {
                const Floats best = nearest(before[v] + bend * (sum[v] * back[v]));
                const Floats kept = smaller(larger(best, splat(0.0f)), splat(LARGEST));
                move[v] = still ? splat(0.0f) : (kept - before[v]) * step[v];
                if (!still) before[v] = kept;
                left[v] = left[v] + move[v];
                store(moves + c * STRIP + v * LANES, move[v]);
            }
            strip.write(before, integers + c * rows);
            strip.write(left, error + c * rows);
        }
    });
}
