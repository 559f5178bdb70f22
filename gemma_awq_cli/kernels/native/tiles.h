// Products of bfloat16 numbers with float32 sums on processors that multiply tiles of them (AMX): what products.h does,
// several times as fast. Whether this processor has them is asked when the library is used.
//
// A tile of the left side is 16 rows of 16 words, one of the right side 16 words of 16 columns, a word being two numbers
// next to each other along the sum; their product is 16 x 16 sums. Two by two tiles are multiplied at a time, which
// leaves the memory as much time as the arithmetic needs. Both sides are laid out in bands of 32 rows or columns, each
// 16 words at a time. Sums are added up in one order, whatever the number of threads.
#pragma once

#include "products.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_TILES 1

#include <cpuid.h>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

#define WITH_TILES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")))

constexpr int BAND = 32;             // rows or columns: two tiles
constexpr int STEP = 16;              // words along the sum: a tile
constexpr int BOTH = BAND * STEP;    // words of two tiles
constexpr int64_t STEPS = 64;         // that are summed before they are added to the sums before them
constexpr int64_t SQUARE = 6;         // bands of either side that meet while they are in the second cache

INLINE int64_t bands_of(int64_t columns) { return (columns + BAND - 1) / BAND; }
INLINE int64_t steps_of(int64_t numbers) { return (numbers + 2 * STEP - 1) / (2 * STEP); }

// Whether this processor multiplies tiles, and the system lets this process use them: it must be asked once.
static bool multiplies_tiles() {
    static const bool does = [] {
        unsigned a, b, c, d;
        const unsigned bf16 = 1u << 22, tile = 1u << 24;
        if (!multiplies_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0) return false;
        const long ask_for_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
    }();
    return does;
}

// What the tiles of this thread look like while one of these lives. Other libraries set them too, so they are set back.
struct Shape {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
};
class Tiled {
  public:
    WITH_TILES Tiled() {
        _tile_storeconfig(&before_);
        settle(&before_);
        Shape shape;
        memset(&shape, 0, sizeof shape);
        shape.palette = 1;
        for (int i = 0; i < 8; i++) shape.bytes[i] = 4 * STEP, shape.rows[i] = STEP;
        settle(&shape);
        _tile_loadconfig(&shape);
    }
    WITH_TILES ~Tiled() {
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }

  private:
    // GCC's intrinsics tell the compiler of the first eight bytes only: without this it may leave out the others.
    static void settle(const Shape* shape) { __asm__ volatile("" : : "r"(shape) : "memory"); }
    Shape before_;
};

// Where the tiles of a band's left side are: bytes between two rows, words from the first tile to the second, and from
// one step to the next.
struct LeftTiles {
    const uint32_t* words;
    int64_t row_bytes, second, step;
};
constexpr int64_t LAID_ROW = 4 * STEP, LAID_SECOND = STEP * STEP, LAID_STEP = BOTH;  // of sides that are laid out here

// Adds the products of `steps` steps to the sums in tiles 0 to 3. right: laid out.
WITH_TILES static void add_steps(LeftTiles left, const uint32_t* right, int64_t steps) {
    for (int64_t s = 0; s < steps; s++, left.words += left.step, right += BOTH) {
        _tile_loadd(4, left.words, left.row_bytes);
        _tile_loadd(6, right, 4 * BAND);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + STEP, 4 * BAND);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left.words + left.second, left.row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

WITH_TILES static void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// out [rows, columns], both up to 32, += the sums in the tiles, or `=` if there is nothing in `out` yet.
WITH_TILES static void take_sums(float* out, int64_t stride, int64_t rows, int64_t columns, bool adds) {
    alignas(64) float sums[BAND * BAND];
    _tile_stored(0, sums, 4 * BAND);
    _tile_stored(1, sums + 16, 4 * BAND);
    _tile_stored(2, sums + 16 * BAND, 4 * BAND);
    _tile_stored(3, sums + 16 * BAND + 16, 4 * BAND);
    const uint32_t there = columns >= BAND ? ~0u : (1u << columns) - 1;
    for (int64_t i = 0; i < std::min<int64_t>(rows, BAND); i++, out += stride)
        UNROLL for (int j = 0; j < 2; j++) {
            const __mmask16 mask = (__mmask16)(there >> (16 * j));
            const __m512 sum = _mm512_load_ps(sums + i * BAND + 16 * j);
            _mm512_mask_storeu_ps(out + 16 * j, mask,
                                  adds ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + 16 * j), sum) : sum);
        }
}

// Turns a square of 16 x 16 words: `to` gets as rows what are columns of x. apart, to_apart: words between two rows.
// rows: that x has; the others count as 0.
WITH_BF16 static void turn_square(const uint32_t* x, int64_t apart, int64_t rows, uint32_t* to, int64_t to_apart) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = i < rows ? _mm512_loadu_si512(x + i * apart) : _mm512_setzero_si512();
    UNROLL for (int i = 0; i < 16; i += 2) {  // pairs of rows, within each quarter
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {  // four rows: a[i + c] has column c of each quarter
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int c = 0; c < 4; c++) {  // quarter q of four registers becomes row 4 q + c
        const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        _mm512_storeu_si512(to + c * to_apart, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_storeu_si512(to + (4 + c) * to_apart, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_storeu_si512(to + (8 + c) * to_apart, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_storeu_si512(to + (12 + c) * to_apart, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// Lays out a band of the right side as one of the left side.
static void turn_band(const uint32_t* right, int64_t steps, uint32_t* left) {
    for (int64_t s = 0; s < steps; s++, right += BOTH, left += BOTH)
        for (int half = 0; half < 2; half++)
            turn_square(right + half * STEP, BAND, STEP, left + half * LAID_SECOND, STEP);
}

// total [columns, columns] += left^T right, both laid out, `apart` words between two bands. upper: only bands on or above
// the diagonal.
static void add_sides(Pool& pool, const uint32_t* left, const uint32_t* right, int64_t apart, int64_t steps, bool upper,
                      float* total, int64_t columns) {
    const int64_t bands = bands_of(columns), side = bands > 4 * SQUARE ? SQUARE : SQUARE / 2, squares = (bands + side - 1) / side;
    pool.run(squares * squares, [&](int64_t item, int) {
        const int64_t top = item / squares * side, first = item % squares * side;
        if (upper && top > first) return;
        const Tiled tiled;
        for (int64_t q = first; q < std::min(bands, first + side); q++)
            for (int64_t p = top; p < std::min(upper ? q + 1 : bands, top + side); p++) {
                clear_sums();
                add_steps({left + p * apart, LAID_ROW, LAID_SECOND, LAID_STEP}, right + q * apart, steps);
                take_sums(total + p * BAND * columns + q * BAND, columns, columns - p * BAND, columns - q * BAND, true);
            }
    });
}

// See add_gram in products.h.
static void add_gram_in_tiles(Pool& pool, const void* x, bool narrow, int64_t stride, int64_t tokens, int64_t columns,
                              const float* roots, float* total, float* magnitudes) {
    const int64_t bands = bands_of(columns), most = 2 * STEP * STEPS, apart = steps_of(std::min(most, tokens)) * BOTH;
    uint32_t *const right = panels_for(2 * bands * apart), *const left = right + bands * apart;
    for (int64_t from = 0; from < tokens; from += most) {
        const int64_t here = std::min(most, tokens - from), steps = steps_of(here);
        const void* rows = narrow ? (const void*)((const uint16_t*)x + from * stride) : (const float*)x + from * stride;
        pool.run(bands, [&](int64_t p, int) {
            lay_out<2>(rows, narrow, stride, here, steps * STEP, p * BAND, columns, roots ? roots + from : nullptr,
                       right + p * apart, magnitudes);
            turn_band(right + p * apart, steps, left + p * apart);
        });
        add_sides(pool, left, right, apart, steps, true, total, columns);
    }
}

// See add_cross in products.h.
static void add_cross_in_tiles(Pool& pool, const float* left, int64_t left_stride, const float* right,
                               int64_t right_stride, int64_t tokens, int64_t columns, const float* factors, float* total) {
    const int64_t bands = bands_of(columns), most = 2 * STEP * STEPS, apart = steps_of(std::min(most, tokens)) * BOTH;
    uint32_t* const laid = panels_for((2 * bands + pool.threads()) * apart);
    uint32_t *const lefts = laid, *const rights = laid + bands * apart, *const spare = rights + bands * apart;
    for (int64_t from = 0; from < tokens; from += most) {
        const int64_t here = std::min(most, tokens - from), steps = steps_of(here);
        pool.run(2 * bands, [&](int64_t item, int thread) {
            const int64_t p = item / 2;
            if (item % 2) {
                lay_out<2>(right + from * right_stride, false, right_stride, here, steps * STEP, p * BAND, columns,
                           factors ? factors + from : nullptr, rights + p * apart, nullptr);
                return;
            }
            uint32_t* const words = spare + thread * apart;
            lay_out<2>(left + from * left_stride, false, left_stride, here, steps * STEP, p * BAND, columns, nullptr,
                       words, nullptr);
            turn_band(words, steps, lefts + p * apart);
        });
        add_sides(pool, lefts, rights, apart, steps, false, total, columns);
    }
}

constexpr int64_t ROWS_A_TURN = 128, OUTPUTS_A_TURN = 256;  // of a product, for which both sides fit the second cache

// Lays out up to 32 rows of `pairs` words, `apart` words from each other, as a band of the right side, whose columns they
// become. pairs: whole steps.
static void turn_rows(const uint32_t* x, int64_t apart, int64_t rows, int64_t pairs, uint32_t* to) {
    for (int64_t t = 0; t < pairs; t += STEP, to += BOTH)
        for (int64_t c = 0; c < BAND; c += 16) turn_square(x + c * apart + t, apart, rows - c, to + c, BAND);
}

// See multiply in products.h.
static void multiply_in_tiles(Pool& pool, const Factor& left, const Factor& right, float* out) {
    const int64_t pairs = left.pairs(), steps = pairs / STEP, apart = steps * BOTH, turn = OUTPUTS_A_TURN / BAND;
    const int64_t outputs = right.rows;
    uint32_t* const laid = panels_for(right.parts * turn * apart);
    for (int64_t first = 0; first < outputs; first += OUTPUTS_A_TURN) {
        const int64_t bands = bands_of(std::min(OUTPUTS_A_TURN, outputs - first));
        pool.run(right.parts * bands, [&](int64_t item, int) {
            const int64_t part = item / bands, q = item % bands;
            turn_rows(right.words(part) + (first + q * BAND) * pairs, pairs, BAND, pairs, laid + (part * turn + q) * apart);
        });
        pool.run((left.rows + ROWS_A_TURN - 1) / ROWS_A_TURN, [&](int64_t item, int) {
            const Tiled tiled;
            const int64_t top = item * ROWS_A_TURN, bottom = std::min(left.rows, top + ROWS_A_TURN);
            for (int64_t q = 0; q < bands; q++)
                for (int64_t from = 0; from < steps; from += STEPS)
                    for (int64_t row = top; row < bottom; row += BAND) {
                        clear_sums();
                        each_product(left, right, [&](int64_t a, int64_t b) {
                            add_steps({left.words(a) + row * pairs + from * STEP, 4 * pairs, 16 * pairs, STEP},
                                      laid + (b * turn + q) * apart + from * BOTH, std::min(STEPS, steps - from));
                        });
                        take_sums(out + row * outputs + first + q * BAND, outputs, bottom - row,
                                  outputs - first - q * BAND, from > 0);
                    }
        });
    }
}

// What one thread needs for attention: the sides of its products, in tiles.
struct TiledAttentionSpace {
    int64_t steps;  // along the tokens: as many as their bands
    std::vector<uint32_t> keys, values, queries, weights;
    std::vector<float> scores, sums, inverse;
    TiledAttentionSpace(int64_t tokens, int64_t size)
        : steps(steps_of(tokens)), keys(steps * steps_of(size) * BOTH), values(bands_of(size) * steps * BOTH),
          queries(BAND * size / 2), weights(BAND * STEP * steps), scores(BAND * BAND * steps), sums(BAND * size),
          inverse(BAND) {}
};

// See attend_rows in products.h. size: a multiple of 32.
static void attend_rows_in_tiles(TiledAttentionSpace& space, const Heads& q, const Heads& k, const Heads& v, int64_t row,
                                 int64_t group, int64_t heads, int64_t groups, int64_t tokens, int64_t size,
                                 int64_t window, float scale, uint16_t* out) {
    const int64_t words = size / 2, apart = words / STEP * BOTH, shared = heads / groups, wide = BAND * space.steps;
    for (int64_t p = 0; p < bands_of(tokens); p++)
        turn_rows(k.words(row, group) + p * BAND * (k.strides.token / 2), k.strides.token / 2, tokens - p * BAND, words,
                  space.keys.data() + p * apart);
    for (int64_t p = 0; p < bands_of(size); p++)
        lay_out<2>(v.words(row, group), true, v.strides.token, tokens, space.steps * STEP, p * BAND, size, nullptr,
                   space.values.data() + p * space.steps * BOTH, nullptr);
    const Tiled tiled;
    for (int64_t head = group * shared; head < (group + 1) * shared; head++)
        for (int64_t from = 0; from < tokens; from += BAND) {
            const int64_t count = std::min<int64_t>(BAND, tokens - from), end = from + count;
            // the bands of keys that one of the queries sees
            const int64_t first = std::max<int64_t>(0, from - window + 1) / BAND, last = bands_of(end), own = last - first;
            for (int64_t i = 0; i < BAND; i++) {
                uint32_t* const to = space.queries.data() + i * words;
                if (i < count) memcpy(to, q.words(row, head) + (from + i) * (q.strides.token / 2), 4 * words);
                else memset(to, 0, 4 * words);
            }
            for (int64_t p = first; p < last; p++) {
                clear_sums();
                add_steps({space.queries.data(), 4 * words, STEP * words, STEP}, space.keys.data() + p * apart, words / STEP);
                take_sums(space.scores.data() + p * BAND, wide, BAND, BAND, false);
            }
            for (int64_t i = 0; i < count; i++) {
                const int64_t seen = std::max<int64_t>(0, from + i - window + 1) - BAND * first;
                space.inverse[i] = 1.0f / weigh(space.scores.data() + i * wide + BAND * first, seen,
                                                from + i + 1 - BAND * first, BAND * own, scale,
                                                (uint16_t*)(space.weights.data() + i * own * STEP));
            }
            memset(space.weights.data() + count * own * STEP, 0, 4 * (BAND - count) * own * STEP);
            for (int64_t p = 0; p < bands_of(size); p++) {
                clear_sums();
                add_steps({space.weights.data(), 4 * STEP * own, STEP * STEP * own, STEP},
                          space.values.data() + (p * space.steps + first) * BOTH, own);
                take_sums(space.sums.data() + p * BAND, size, BAND, BAND, false);
            }
            for (int64_t i = 0; i < count; i++)
                store_scaled(space.sums.data() + i * size, size, space.inverse[i],
                             out + ((row * tokens + from + i) * heads + head) * size);
        }
}
#endif
