// The largest logits of each row, from which its next token is chosen: one pass over the vocabulary, on all threads.
#pragma once

#include "pool.h"
#include "vec.h"

#include <algorithm>

constexpr int64_t STRETCH = 128;  // logits of which the largest is kept: few enough to look through again
constexpr int64_t PIECE = 128;    // stretches that a thread takes at once

// The largest of `count` numbers; NaN if one of them is NaN or infinite.
INLINE float finite_top(const float* x, int64_t count) {
    Floats top = splat(-INFINITY);
    Ints worst = splat(0);  // of the bits of magnitudes, which are ordered as the numbers are
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats v = load(x + i);
        const Ints bits = (Ints)absolute(v);
        top = larger(v, top);
        worst = bits > worst ? bits : worst;
    }
    float most = largest(top);
    int32_t bits = largest(worst);
    for (; i < count; i++) {
        int32_t one;
        memcpy(&one, x + i, 4);
        bits = std::max(bits, one & 0x7fffffff);
        most = std::max(most, x[i]);
    }
    return bits < 0x7f800000 ? most : NAN;
}

// Finds the row's `count` largest logits: in descending order, equal ones by token. tops: of its stretches; all finite.
static void find_leading(const float* logits, int64_t entries, const float* tops, int64_t stretches, int64_t count,
                         float* values, int32_t* tokens) {
    float limit = -INFINITY;
    if (stretches >= count) {  // so many stretches have a logit of this or more: none of the largest is below it
        std::vector<float> sorted(tops, tops + stretches);
        std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<float>());
        limit = sorted[count - 1];
    }
    std::vector<int32_t> found;
    for (int64_t s = 0; s < stretches; s++) {
        if (tops[s] < limit) continue;
        for (int64_t i = s * STRETCH; i < std::min(entries, (s + 1) * STRETCH); i++)
            if (logits[i] >= limit) found.push_back((int32_t)i);
    }
    const auto before = [&](int32_t a, int32_t b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    std::partial_sort(found.begin(), found.begin() + count, found.end(), before);
    for (int64_t i = 0; i < count; i++) {
        tokens[i] = found[i];
        values[i] = logits[found[i]];
    }
}

// logits: [rows, entries]; values, tokens: [rows, count], count <= entries. The first token of a row with a logit that is
// not finite is -1.
static void leading(Pool& pool, const float* logits, int64_t rows, int64_t entries, int64_t count, float* values,
                    int32_t* tokens) {
    const int64_t stretches = (entries + STRETCH - 1) / STRETCH, pieces = (stretches + PIECE - 1) / PIECE;
    std::vector<float> tops(rows * stretches);
    pool.run(rows * pieces, [&](int64_t item, int) {
        const int64_t row = item / pieces, first = item % pieces * PIECE;
        for (int64_t s = first; s < std::min(stretches, first + PIECE); s++)
            tops[row * stretches + s] =
                finite_top(logits + row * entries + s * STRETCH, std::min(STRETCH, entries - s * STRETCH));
    });
    pool.run(rows, [&](int64_t row, int) {
        const float* own = tops.data() + row * stretches;
        if (std::any_of(own, own + stretches, [](float top) { return top != top; })) tokens[row * count] = -1;
        else find_leading(logits + row * entries, entries, own, stretches, count, values + row * count, tokens + row * count);
    });
}
