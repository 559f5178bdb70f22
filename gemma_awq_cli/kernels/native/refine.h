// Makes a coarse head's largest logits exact: of each row, those that hold practically all of the probability are
// recomputed from the 16-bit weight.
#pragma once

#include "linear.h"

constexpr float REACH = 14.0f;  // below the largest logit, beyond which none is recomputed
constexpr int BINS = 56;
constexpr float MISSED = 0.003f;  // share of the probability that may stay coarse
constexpr int64_t MOST = 3072;    // blocks that are searched; if more are within reach, the nearest bins of them

// The coarse logits of one row, and what is recomputed of them.
struct Refined {
    float* logits;               // [entries]
    const float* tops;           // the largest logit of each BLOCK entries
    std::vector<int32_t> likely;  // entries, ascending
};

// The largest of `count` logits.
INLINE float top_of(const float* logits, int64_t count) {
    Floats top = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) top = larger(load(logits + i), top);
    float most = largest(top);
    for (; i < count; i++) most = std::max(most, logits[i]);
    return most;
}

// Finds the entries that hold all but MISSED of the row's probability.
static void find_likely(Refined& row, int64_t entries) {
    const int64_t blocks = blocks_of(entries);
    const float top = top_of(row.tops, blocks);
    const auto bin_of = [&](float logit) { return std::min(BINS - 1, (int)((top - logit) * (BINS / REACH))); };
    int64_t counts[BINS] = {};
    for (int64_t b = 0; b < blocks; b++)
        if (row.tops[b] > top - REACH) counts[bin_of(row.tops[b])]++;  // NaN never is
    int bins = 0;
    for (int64_t total = 0; bins < BINS && (total += counts[bins]) <= MOST;) bins++;
    const float limit = top - (REACH / BINS) * (float)bins;
    const auto near_blocks = std::count_if(row.tops, row.tops + blocks, [&](float one) { return one > limit; });
    row.likely.resize(near_blocks * BLOCK + 1);
    int32_t* likely = row.likely.data();
    int64_t found = 0;
    for (int64_t b = 0; b < blocks; b++) {
        if (!(row.tops[b] > limit)) continue;
        for (int64_t i = b * BLOCK; i < std::min(entries, (b + 1) * BLOCK); i++) {
            likely[found] = (int32_t)i;  // without a branch, which could not be predicted
            found += row.logits[i] > limit;
        }
    }
    memset(counts, 0, sizeof counts);
    for (int64_t i = 0; i < found; i++) counts[bin_of(row.logits[likely[i]])]++;
    float mass[BINS], all = 0, held = 0;
    for (int n = 0; n < BINS; n++) all += mass[n] = (float)counts[n] * std::exp(-((float)n + 0.5f) * (REACH / BINS));
    for (bins = 0; bins < BINS && held < all * (1 - MISSED);) held += mass[bins++];
    const float nearer = top - (REACH / BINS) * (float)bins;
    int64_t kept = 0;
    for (int64_t i = 0; i < found; i++) {
        const int32_t entry = likely[i];
        likely[kept] = entry;
        kept += row.logits[entry] > nearer;
    }
    row.likely.resize(kept);
}

// C entries from x [inputs], the head's input: independent sums hide the latency of one.
template <int C>
static void recompute(const uint16_t* exact, int64_t inputs, float cap, const float* x, float* logits, const int32_t* entries) {
    Floats acc[C];
    for (int c = 0; c < C; c++) acc[c] = splat(0.0f);
    const int64_t whole = inputs & ~(LANES - 1);
    for (int64_t k = 0; k < whole; k += LANES) {
        const Floats v = load(x + k);
        for (int c = 0; c < C; c++) acc[c] = fma(load_bf16(exact + (int64_t)entries[c] * inputs + k), v, acc[c]);
    }
    for (int c = 0; c < C; c++) {
        float logit = sum(acc[c]);
        for (int64_t k = whole; k < inputs; k++) logit += float_of(exact[(int64_t)entries[c] * inputs + k]) * x[k];
        logits[entries[c]] = cap > 0 ? soft_cap(logit, cap) : logit;
    }
}

// exact: bf16 [entries, inputs]; x: [rows, inputs]. Rows that recompute the same entry do so one after the other, so that
// the weight is read once.
static void refine(Pool& pool, const uint16_t* exact, int64_t inputs, int64_t entries, float cap, const float* x,
                   std::vector<Refined>& rows, int64_t count) {
    pool.run(count, [&](int64_t r, int) { find_likely(rows[r], entries); });
    const int64_t step = 1024;
    pool.run((entries + step - 1) / step, [&](int64_t item, int) {
        for (int64_t r = 0; r < count; r++) {
            const std::vector<int32_t>& likely = rows[r].likely;
            const int32_t* i = likely.data() + (std::lower_bound(likely.begin(), likely.end(), item * step) - likely.begin());
            const int32_t* last = likely.data() + (std::lower_bound(likely.begin(), likely.end(), (item + 1) * step) - likely.begin());
            const float* input = x + r * inputs;
            for (; i + 4 <= last; i += 4) {
                for (const int32_t* next = i + 4; next < std::min(last, i + 8); next++)
                    for (int64_t k = 0; k < inputs; k += 32) __builtin_prefetch(exact + (int64_t)*next * inputs + k);
                recompute<4>(exact, inputs, cap, input, rows[r].logits, i);
            }
            for (; i < last; i++) recompute<1>(exact, inputs, cap, input, rows[r].logits, i);
        }
    });
}
