// What one step of the descent on scales (awq/scale_descent.py) sums over a weight.
#pragma once

#include "pool.h"
#include "vec.h"

// The extreme of some lanes that `sign` times the numbers has, and the place of the first number that is as large.
struct Extreme {
    Floats best;
    Ints place;
    inline __attribute__((always_inline)) void meet(Floats x, Ints at) {
        const Ints more = x > best;
        best = more ? x : best;
        place = more ? at : place;
    }
    inline __attribute__((always_inline)) float found(int32_t* at) const {
        const float most = largest(best);
        const Ints first = (best == splat(most)) ? place : splat((int32_t)0x7fffffff);
        *at = -largest(-first);
        return most;
    }
};

// See `add_stretch`. weight: [rows, groups * group]; scale: [groups * group]; spread: [groups]; stretch: as scale.
static void add_stretch(Pool& pool, const float* weight, int64_t row_stride, const float* scale, float share, int64_t rows,
                        int64_t groups, int64_t group, float* spread, float* stretch) {
    Ints lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    pool.run(groups, [&](int64_t g, int) {
        const float* const own = scale + g * group;
        float* const to = stretch + g * group;
        float total = 0;
        for (int64_t r = 0; r < rows; r++) {
            const float* const w = weight + r * row_stride + g * group;
            Extreme high{splat(-INFINITY), lanes}, low = high;
            for (int64_t k = 0; k < group; k += LANES) {
                const Floats x = load(w + k) * load(own + k);
                const Ints at = lanes + splat((int32_t)k);
                high.meet(x, at);
                low.meet(-x, at);
            }
            int32_t top, bottom;
            const float most = std::max(0.0f, high.found(&top)), least = -std::max(0.0f, low.found(&bottom));
            const float width = share * (most - least);
            total += width * (most - least);
            if (most > 0) to[top] += width * most;
            if (least < 0) to[bottom] -= width * least;
        }
        spread[g] += total;
    });
}
