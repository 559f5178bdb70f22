// Makes a coarse head's largest logits exact: of each row, those of likely entries are recomputed from the 16-bit weight.
#pragma once

#include "linear.h"

constexpr float REACH = 14.0f;  // below the largest logit, beyond which no token is LIKELY
constexpr int BINS = 56;
// The probability from which on a token's logit is recomputed. A logit that stays coarse costs about its probability times
// half the error's square: one threshold for all tokens gives the smallest divergence for as many recomputed logits.
constexpr float LIKELY = 2e-6f;
constexpr int64_t MOST = 32768;  // of them in a row: more than the nearest bins that hold so many are not recomputed

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

// Finds the entries that are LIKELY, as the coarse logits have it.
static void find_likely(Refined& row, int64_t entries) {
    const int64_t blocks = blocks_of(entries);
    const float top = top_of(row.tops, blocks);
    const auto bin_of = [&](float logit) { return std::min(BINS - 1, (int)((top - logit) * (BINS / REACH))); };
    const float limit = top - REACH;
    const auto near_blocks = std::count_if(row.tops, row.tops + blocks, [&](float one) { return one > limit; });  // NaN is not
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
    int64_t counts[BINS] = {};
    for (int64_t i = 0; i < found; i++) counts[bin_of(row.logits[likely[i]])]++;
    float all = 0;
    for (int n = 0; n < BINS; n++) all += (float)counts[n] * std::exp(-((float)n + 0.5f) * (REACH / BINS));
    int bins = 0;
    for (int64_t total = 0; bins < BINS && (total += counts[bins]) <= MOST;) bins++;
    const float nearer = top + std::max(std::log(all * LIKELY), -(REACH / BINS) * (float)bins);
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
