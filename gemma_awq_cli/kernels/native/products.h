// Products of bfloat16 numbers with float32 sums, on processors that have an instruction for them (AVX512-BF16). Whether
// this one has is asked when the library is used, not when it is compiled: every x86-64 library has the code.
//
// The instruction multiplies pairs, so both sides are laid out in words of two numbers that are next to each other along
// the sum: in panels of 48 columns, [panel][pair][48]. Sums are added up in one order, whatever the number of threads.
#pragma once

#include "pool.h"
#include "vec.h"

#include <algorithm>
#include <vector>

constexpr int PANEL = 48;           // columns: three registers of 16 sums
constexpr int TALL = 8;             // rows of a tile, whose 24 sums the registers hold
constexpr int64_t RUN = 256;        // pairs that are summed before they are added to the sums before them
constexpr int64_t SLICE = 2 * RUN;  // pairs that are laid out at a time

INLINE int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// Memory for panels, which begin where a register's worth of them does. It is kept and only ever grown.
static std::vector<uint32_t> the_words;
static uint32_t* panels_for(int64_t words) {
    if ((int64_t)the_words.size() < words + 16) the_words.resize(words + 16);
    return (uint32_t*)(((uintptr_t)the_words.data() + 63) & ~(uintptr_t)63);
}

#if defined(__x86_64__)
#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))

static bool multiplies_bf16() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// How the left side of a tile is laid out: as panels are, or as rows of words.
enum Left { IN_PANELS, IN_ROWS };

// out [ROWS, <= 16 VECTORS] += a b of `pairs` pairs, or `=` if there is nothing in `out` yet. a: ROWS columns of a panel,
// or rows `apart` words from each other; b: a panel; columns: that out has from here on.
template <int ROWS, int VECTORS, Left LEFT>
WITH_BF16 static void tile_of(const uint32_t* a, int64_t apart, const uint32_t* b, int64_t pairs, float* out,
                              int64_t stride, int64_t columns, bool adds) {
    __m512 sums[ROWS][VECTORS];
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < VECTORS; j++) sums[i][j] = _mm512_setzero_ps();
    for (int64_t t = 0; t < pairs; t++, a += LEFT == IN_ROWS ? 1 : PANEL, b += PANEL) {
        __m512bh right[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
        UNROLL for (int i = 0; i < ROWS; i++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[LEFT == IN_ROWS ? i * apart : i]);
            UNROLL for (int j = 0; j < VECTORS; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, right[j]);
        }
    }
    const uint64_t there = columns >= PANEL ? ~0ull : (1ull << columns) - 1;
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < VECTORS; j++) {
        const __mmask16 mask = (__mmask16)(there >> (16 * j));
        float* to = out + i * stride + 16 * j;
        const __m512 sum = adds ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums[i][j]) : sums[i][j];
        _mm512_mask_storeu_ps(to, mask, sum);
    }
}

template <int ROWS, Left LEFT>
WITH_BF16 static void tile_of(const uint32_t* a, int64_t apart, const uint32_t* b, int64_t pairs, float* out,
                              int64_t stride, int64_t columns, bool adds) {
    if (columns > 32) tile_of<ROWS, 3, LEFT>(a, apart, b, pairs, out, stride, columns, adds);
    else if (columns > 16) tile_of<ROWS, 2, LEFT>(a, apart, b, pairs, out, stride, columns, adds);
    else tile_of<ROWS, 1, LEFT>(a, apart, b, pairs, out, stride, columns, adds);
}

// out [rows, <= 48] += a b: `rows` columns of a panel, or rows.
template <Left LEFT>
WITH_BF16 static void tiles_of(const uint32_t* a, int64_t apart, int64_t rows, const uint32_t* b, int64_t pairs,
                               float* out, int64_t stride, int64_t columns, bool adds) {
    const int64_t step = LEFT == IN_ROWS ? apart : 1;
    int64_t i = 0;
    for (; i + TALL <= rows; i += TALL)
        tile_of<TALL, LEFT>(a + i * step, apart, b, pairs, out + i * stride, stride, columns, adds);
    for (; i < rows; i++) tile_of<1, LEFT>(a + i * step, apart, b, pairs, out + i * stride, stride, columns, adds);
}

// Lays out columns `first` .. of `tokens` rows of x as `pairs` x 16 VECTORS words, rounded to bf16 after they are
// multiplied with `roots` (null: with 1), and adds their magnitudes to `magnitudes` (null: to nothing). What is beyond
// the last row or column becomes 0. x: float32 or, `narrow`, bf16; stride: of its rows, in numbers.
template <int VECTORS>
WITH_BF16 static void lay_out(const void* x, bool narrow, int64_t stride, int64_t tokens, int64_t pairs, int64_t first,
                              int64_t columns, const float* roots, uint32_t* words, float* magnitudes) {
    __mmask16 mask[VECTORS];
    __m512 total[VECTORS];
    UNROLL for (int j = 0; j < VECTORS; j++) {
        const int64_t left = columns - first - 16 * j;
        mask[j] = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        total[j] = _mm512_setzero_ps();
    }
    for (int64_t t = 0; t < 2 * pairs; t += 2, words += 16 * VECTORS)
        UNROLL for (int j = 0; j < VECTORS; j++) {
            __m512i halves[2];
            UNROLL for (int h = 0; h < 2; h++) {
                __m512 v = _mm512_setzero_ps();
                if (t + h < tokens) {
                    const int64_t at = (t + h) * stride + first + 16 * j;
                    v = narrow ? _mm512_castsi512_ps(_mm512_slli_epi32(
                                     _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask[j], (const uint16_t*)x + at)), 16))
                               : _mm512_maskz_loadu_ps(mask[j], (const float*)x + at);
                    total[j] = _mm512_add_ps(total[j], _mm512_abs_ps(v));
                    if (roots) v = _mm512_mul_ps(v, _mm512_set1_ps(roots[t + h]));
                }
                halves[h] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v));
            }
            _mm512_storeu_si512(words + 16 * j, _mm512_or_si512(halves[0], _mm512_slli_epi32(halves[1], 16)));
        }
    UNROLL for (int j = 0; j < VECTORS; j++) {
        float* to = magnitudes + first + 16 * j;
        if (magnitudes && mask[j]) _mm512_mask_storeu_ps(to, mask[j], _mm512_add_ps(_mm512_maskz_loadu_ps(mask[j], to), total[j]));
    }
}

// total [columns, columns] += x^T x in every tile on or above the diagonal; magnitudes [columns] += sums of |x|.
static void add_gram(Pool& pool, const void* x, bool narrow, int64_t stride, int64_t tokens, int64_t columns,
                     const float* roots, float* total, float* magnitudes) {
    const int64_t panels = panels_of(columns), most = std::min(SLICE, (tokens + 1) / 2);
    uint32_t* const laid = panels_for(panels * most * PANEL);
    for (int64_t from = 0; from < tokens; from += 2 * SLICE) {
        const int64_t here = std::min(2 * SLICE, tokens - from), pairs = (here + 1) / 2;
        const void* rows = narrow ? (const void*)((const uint16_t*)x + from * stride) : (const float*)x + from * stride;
        pool.run(panels, [&](int64_t p, int) {
            lay_out<3>(rows, narrow, stride, here, pairs, p * PANEL, columns, roots ? roots + from : nullptr,
                    laid + p * most * PANEL, magnitudes);
        });
        pool.run(panels * (panels + 1) / 2, [&](int64_t item, int) {
            int64_t p = 0;
            for (int64_t left = panels; item >= left; item -= left--) p++;
            const int64_t q = p + item, height = std::min((int64_t)PANEL, columns - p * PANEL);
            const uint32_t *a = laid + p * most * PANEL, *b = laid + q * most * PANEL;
            for (int64_t run = 0; run < pairs; run += RUN)
                tiles_of<IN_PANELS>(a + run * PANEL, 0, height, b + run * PANEL, std::min(RUN, pairs - run),
                                    total + p * PANEL * columns + q * PANEL, columns, columns - q * PANEL, true);
        });
    }
}

// total [columns, columns] += left^T right, the rows of right multiplied with `factors` before they are rounded.
static void add_cross(Pool& pool, const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                      int64_t tokens, int64_t columns, const float* factors, float* total) {
    const int64_t panels = panels_of(columns), most = std::min(SLICE, (tokens + 1) / 2), side = panels * most * PANEL;
    uint32_t* const laid = panels_for(2 * side);
    for (int64_t from = 0; from < tokens; from += 2 * SLICE) {
        const int64_t here = std::min(2 * SLICE, tokens - from), pairs = (here + 1) / 2;
        pool.run(2 * panels, [&](int64_t item, int) {
            const int64_t p = item / 2;
            uint32_t* const words = laid + p * most * PANEL;
            if (item % 2 == 0)
                lay_out<3>(left + from * left_stride, false, left_stride, here, pairs, p * PANEL, columns, nullptr, words,
                           nullptr);
            else
                lay_out<3>(right + from * right_stride, false, right_stride, here, pairs, p * PANEL, columns,
                           factors ? factors + from : nullptr, words + side, nullptr);
        });
        pool.run(panels * panels, [&](int64_t item, int) {
            const int64_t p = item / panels, q = item % panels, height = std::min((int64_t)PANEL, columns - p * PANEL);
            const uint32_t *a = laid + p * most * PANEL, *b = laid + side + q * most * PANEL;
            for (int64_t run = 0; run < pairs; run += RUN)
                tiles_of<IN_PANELS>(a + run * PANEL, 0, height, b + run * PANEL, std::min(RUN, pairs - run),
                                    total + p * PANEL * columns + q * PANEL, columns, columns - q * PANEL, true);
        });
    }
}

// Lays out rows `first` .. of `rows` rows of `pairs` words as one panel, whose columns they become.
WITH_BF16 static void turn(const uint32_t* x, int64_t apart, int64_t rows, int64_t first, int64_t pairs, uint32_t* words) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)apart));
    for (int64_t c = 0; c < PANEL; c += 16) {
        const int64_t left = rows - first - c;
        const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        const uint32_t* from = x + (first + c) * apart;
        for (int64_t t = 0; t < pairs; t++)
            _mm512_storeu_si512(words + t * PANEL + c, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, places,
                                                                                   (const int*)(from + t), 4));
    }
}

// A side of a product: bf16 numbers, or sums of two bf16 numbers, whose parts are one behind the other. rows: that count;
// height: with those that fill them up to a multiple of 32; width: of a row, another, filled up with zeros.
struct Factor {
    const uint16_t* numbers;
    int64_t parts, rows, height, width;
    int64_t pairs() const { return width / 2; }
    const uint32_t* words(int64_t part) const { return (const uint32_t*)numbers + part * height * pairs(); }
};

// Calls with the parts of both sides whose product counts: that of two second parts is too small.
template <class Body> static void each_product(const Factor& left, const Factor& right, const Body& body) {
    for (int64_t a = 0; a < left.parts; a++)
        for (int64_t b = 0; b < right.parts; b++)
            if (a + b < 2) body(a, b);
}

// Writes x [rows, columns] float32 as the two parts of a factor [2, height, width].
WITH_BF16 static void split_row(const float* x, int64_t columns, int64_t width, uint16_t* first, uint16_t* second) {
    for (int64_t c = 0; c < width; c += 16) {
        const int64_t left = columns - c;
        const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        const __m512 v = _mm512_maskz_loadu_ps(mask, x + c);
        const __m256i high = (__m256i)_mm512_cvtneps_pbh(v);
        const __m512 rest = _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
        _mm256_storeu_si256((__m256i*)(first + c), high);
        _mm256_storeu_si256((__m256i*)(second + c), (__m256i)_mm512_cvtneps_pbh(rest));
    }
}
static void split(Pool& pool, const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t height, int64_t width,
                  uint16_t* out) {
    pool.run(height, [&](int64_t row, int) {
        split_row(row < rows ? x + row * stride : x, row < rows ? columns : 0, width, out + row * width,
                  out + (height + row) * width);
    });
}

// out [left.rows, right.rows] = left right^T
static void multiply(Pool& pool, const Factor& left, const Factor& right, float* out) {
    const int64_t pairs = left.pairs(), words = pairs * PANEL, outputs = right.rows;
    uint32_t* const laid = panels_for(pool.threads() * right.parts * words);
    pool.run(panels_of(outputs), [&](int64_t p, int thread) {
        uint32_t* const panels = laid + thread * right.parts * words;
        for (int64_t part = 0; part < right.parts; part++)
            turn(right.words(part), pairs, outputs, p * PANEL, pairs, panels + part * words);
        bool adds = false;
        each_product(left, right, [&](int64_t a, int64_t b) {
            tiles_of<IN_ROWS>(left.words(a), pairs, left.rows, panels + b * words, pairs, out + p * PANEL, outputs,
                              outputs - p * PANEL, adds);
            adds = true;
        });
    });
}

// e^x of sixteen numbers that are not above 0, to about 2e-7 of it.
WITH_BF16 static inline __m512 power_of_e(__m512 x) {
    const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-100.0f)), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_mul_ps(_mm512_sub_ps(scaled, whole), _mm512_set1_ps(0.693147181f));
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(p, whole);
}

// Where the heads of rows of tokens begin: numbers between two rows, two heads, two tokens.
struct Strides {
    int64_t row, head, token;
};

// What attention multiplies: bf16, each token's head D numbers next to each other, D even.
struct Heads {
    const uint16_t* numbers;
    Strides strides;
    const uint32_t* words(int64_t row, int64_t head) const {
        return (const uint32_t*)(numbers + row * strides.row + head * strides.head);
    }
};

constexpr int64_t QUERIES = 32;  // that meet their keys together

// What one thread needs.
struct AttentionSpace {
    std::vector<uint32_t> keys, values, weights;
    std::vector<float> scores, sums, inverse;
    AttentionSpace(int64_t tokens, int64_t size)
        : keys(panels_of(tokens) * size / 2 * PANEL), values(panels_of(size) * ((tokens + 1) / 2) * PANEL),
          weights(QUERIES * ((tokens + 1) / 2)), scores(QUERIES * tokens), sums(QUERIES * size), inverse(QUERIES) {}
};

// Turns the scores of a query into weights, which are divided by their sum later; returns that sum.
WITH_BF16 static float weigh(float* scores, int64_t first, int64_t end, int64_t padded, float scale, uint16_t* weights) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t j = first; j < end; j += 16) {
        const __mmask16 mask = end - j >= 16 ? 0xffff : (__mmask16)((1u << (end - j)) - 1);
        top = _mm512_mask_max_ps(top, mask, top, _mm512_maskz_loadu_ps(mask, scores + j));
    }
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top)), factor = _mm512_set1_ps(scale);
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 16) {  // beside first .. end - 1 they are 0
        const int64_t after = std::min<int64_t>(16, std::max<int64_t>(0, end - j));
        const int64_t before = std::min<int64_t>(16, std::max<int64_t>(0, first - j));
        const __mmask16 mask = (__mmask16)(((1u << after) - 1) & ~((1u << before) - 1));
        const __m512 s = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + j), most);
        const __m512 e = _mm512_maskz_mov_ps(mask, power_of_e(_mm512_mul_ps(s, factor)));
        total = _mm512_add_ps(total, e);
        const int64_t room = padded - j;
        const __mmask16 to = room >= 16 ? 0xffff : (__mmask16)((1u << room) - 1);
        _mm256_mask_storeu_epi16(weights + j, to, (__m256i)_mm512_cvtneps_pbh(e));
    }
    return _mm512_reduce_add_ps(total);
}

WITH_BF16 static void store_scaled(const float* x, int64_t count, float factor, uint16_t* to) {
    for (int64_t c = 0; c < count; c += 16) {
        const __mmask16 mask = count - c >= 16 ? 0xffff : (__mmask16)((1u << (count - c)) - 1);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + c), _mm512_set1_ps(factor));
        _mm256_mask_storeu_epi16(to + c, mask, (__m256i)_mm512_cvtneps_pbh(v));
    }
}

// Causal attention of the query heads that share a head of keys and values. window: tokens that a query sees, its own
// included. out: [rows, tokens, heads, size].
static void attend_rows(AttentionSpace& space, const Heads& q, const Heads& k, const Heads& v, int64_t row, int64_t group,
                        int64_t heads, int64_t groups, int64_t tokens, int64_t size, int64_t window, float scale,
                        uint16_t* out) {
    const int64_t words = size / 2, pairs = (tokens + 1) / 2, shared = heads / groups;
    for (int64_t p = 0; p < panels_of(tokens); p++)
        turn(k.words(row, group), k.strides.token / 2, tokens, p * PANEL, words, space.keys.data() + p * words * PANEL);
    for (int64_t p = 0; p < panels_of(size); p++)
        lay_out<3>(v.words(row, group), true, v.strides.token, tokens, pairs, p * PANEL, size, nullptr,
                   space.values.data() + p * pairs * PANEL, nullptr);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++)
        for (int64_t from = 0; from < tokens; from += QUERIES) {
            const int64_t count = std::min(QUERIES, tokens - from), end = from + count;
            // the panels and pairs of keys that one of the queries sees
            const int64_t first = std::max<int64_t>(0, from - window + 1) / PANEL, pair = first * PANEL / 2;
            const int64_t own = (end + 1) / 2 - pair;
            for (int64_t p = first; p < panels_of(end); p++)
                tiles_of<IN_ROWS>(q.words(row, head) + from * (q.strides.token / 2), q.strides.token / 2, count,
                                  space.keys.data() + p * words * PANEL, words, space.scores.data() + p * PANEL, tokens,
                                  tokens - p * PANEL, false);
            for (int64_t i = 0; i < count; i++) {
                const int64_t seen = std::max<int64_t>(0, from + i - window + 1) - 2 * pair;
                space.inverse[i] = 1.0f / weigh(space.scores.data() + i * tokens + 2 * pair, seen, from + i + 1 - 2 * pair,
                                                2 * own, scale, (uint16_t*)(space.weights.data() + i * own));
            }
            for (int64_t p = 0; p < panels_of(size); p++)
                tiles_of<IN_ROWS>(space.weights.data(), own, count, space.values.data() + (p * pairs + pair) * PANEL, own,
                                  space.sums.data() + p * PANEL, size, size - p * PANEL, false);
            for (int64_t i = 0; i < count; i++)
                store_scaled(space.sums.data() + i * size, size, space.inverse[i],
                             out + ((row * tokens + from + i) * heads + head) * size);
        }
}

template <class Space, class Rows>
static void attend_causally(Pool& pool, const Rows& attend, const Heads& q, const Heads& k, const Heads& v, int64_t rows,
                            int64_t heads, int64_t groups, int64_t tokens, int64_t size, int64_t window, float scale,
                            uint16_t* out) {
    std::vector<Space> spaces(pool.threads(), Space(tokens, size));
    pool.run(rows * groups, [&](int64_t item, int thread) {
        attend(spaces[thread], q, k, v, item / groups, item % groups, heads, groups, tokens, size, window, scale, out);
    });
}
#endif
