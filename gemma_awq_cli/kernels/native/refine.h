// Makes a coarse head's largest logits exact, which hold practically all of the probability: it recomputes those near
// the largest one from the 16-bit weight.
#pragma once

#include "linear.h"

#include <array>

constexpr float REACH = 10.0f;  // below the largest logit; a logit further away has less than e^-10 of its probability
constexpr int BINS = 40;
constexpr int64_t MOST = 2048;  // entries that are recomputed; if more are within reach, the nearest bins of them

// exact: bf16 [entries, inputs]; x: [inputs], the head's input; cap: the final soft-cap, 0: none; logits: [entries],
// soft-capped, of which some are replaced.
static void refine(Pool& pool, const uint16_t* exact, int64_t inputs, int64_t entries, float cap, const float* x,
                   float* logits) {
    const int64_t step = 4096, items = (entries + step - 1) / step;
    std::vector<float> tops(items, -INFINITY);
    pool.run(items, [&](int64_t item, int) {
        const int64_t end = std::min(entries, (item + 1) * step);
        int64_t i = item * step;
        Floats top = splat(-INFINITY);
        for (; i + LANES <= end; i += LANES) top = larger(load(logits + i), top);
        float most = largest(top);
        for (; i < end; i++) most = std::max(most, logits[i]);
        tops[item] = most;
    });
    const float top = *std::max_element(tops.begin(), tops.end());
    const auto bin_of = [&](float logit) { return std::min(BINS - 1, (int)((top - logit) * (BINS / REACH))); };
    // calls body(i) for each logit of an item that is within reach; NaN never is
    const auto each_near = [&](int64_t item, const auto& body) {
        const int64_t end = std::min(entries, (item + 1) * step);
        for (int64_t i = item * step; i < end; i += LANES) {
            if (i + LANES <= end && !(largest(load(logits + i)) > top - REACH)) continue;
            for (int64_t j = i; j < std::min<int64_t>(end, i + LANES); j++)
                if (logits[j] > top - REACH) body(j);
        }
    };
    std::vector<std::array<int64_t, BINS>> counts(items);
    pool.run(items, [&](int64_t item, int) {
        counts[item].fill(0);
        each_near(item, [&](int64_t i) { counts[item][bin_of(logits[i])]++; });
    });
    int bins = 0;
    for (int64_t total = 0; bins < BINS; bins++) {
        for (const auto& count : counts) total += count[bins];
        if (total > MOST) break;
    }
    pool.run(items, [&](int64_t item, int) {
        each_near(item, [&](int64_t i) {
            if (bin_of(logits[i]) >= bins) return;
            bf16_tile<1, 1>(exact + i * inputs, inputs, x, logits + i, 1);
            if (cap > 0) logits[i] = soft_cap(logits[i], cap);
        });
    });
}
