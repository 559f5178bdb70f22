// Linears over packed weights. Integer weights are multiplied with activations that are quantized to 8 bits, one scale
// per row and run of `activation_group` inputs, in which the sums are exact integers.
//
// Layout of int4 and int8, for K inputs in groups of g and N outputs: the outputs are split into blocks of 32 (the last
// one is padded with zero scales). A block's group is 32 scales in float16, then the weights in steps of 4 inputs
// (int8) or 8 (int4): 64 bytes for outputs 0..15 and 64 for 16..31, byte 4 lane + j of which holds input j of that
// lane's output; for int4, input j in the low nibble and input j + 4 in the high one. int4 has its zero points, 32
// bytes per block and group, in a second array; an int8 weight is stored + 128.
#pragma once

#include "pool.h"
#include "vec.h"

#include <algorithm>

enum Kind : int32_t { INT4 = 0, INT8 = 1, BF16 = 2, INT4_BY_INPUT = 3 };  // the last is by_input.h's
constexpr int BLOCK = 32;
constexpr int VECTORS = BLOCK / LANES;  // per block
constexpr int MANY = 6;                 // rows at once, as many whose two sums each the registers hold
constexpr int MAX_PARTS = 3;

// One linear as the caller passes it. Of bf16, `parts` are row-major weights [rows, K] whose outputs are joined; they
// are read in place. Of int4 and int8, `data` and `zeros` have the layout above or that of by_input.h.
// Inputs that share a scale: of a weight `group`, of a row of activations `activation_group`, which divides it.
struct LinearSpec {
    int32_t kind;
    int64_t group;
    int64_t activation_group;
    int64_t inputs;
    int64_t outputs;
    const uint8_t* data;
    const uint8_t* zeros;
    const uint16_t* parts[MAX_PARTS];
    int64_t part_rows[MAX_PARTS];
};

INLINE int64_t blocks_of(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK; }
INLINE int64_t group_bytes(int32_t kind, int64_t group) { return 2 * BLOCK + group * BLOCK / (kind == INT4 ? 2 : 1); }

// Activations of some rows, as floats and, for integer weights, quantized.
struct Activations {
    int64_t rows;
    int64_t inputs;
    const float* x;  // [rows, inputs]
    int8_t* q;       // [rows, inputs]
    float* scale;    // [rows, inputs / activation_group]
    float* total;    // [rows, inputs / group]: the sums of q times its scale
};

// Rows `first` .. of the activations of one linear.
INLINE Activations rows_of(const Activations& a, const LinearSpec& w, int64_t first, int64_t rows) {
    if (w.kind == BF16) return {rows, a.inputs, a.x + first * a.inputs, nullptr, nullptr, nullptr};
    const int64_t scales = a.inputs / w.activation_group, totals = a.inputs / w.group;
    return {rows, a.inputs, a.x + first * a.inputs, a.q + first * a.inputs, a.scale + first * scales,
            a.total + first * totals};
}

INLINE void quantize_row(const Activations& a, int64_t row, const LinearSpec& w) {
    const float* x = a.x + row * a.inputs;
    int8_t* q = a.q + row * a.inputs;
    float* scale = a.scale + row * (a.inputs / w.activation_group);
    float* total = a.total + row * (a.inputs / w.group);
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    for (const float* end = x + a.inputs; x < end; total++) {
        Floats totals = splat(0.0f);
        for (const float* group_end = x + w.group; x < group_end; x += w.activation_group, q += w.activation_group) {
            Ints top = splat(0);  // of the bits of magnitudes, which are ordered as the numbers are, and NaN above all
            for (int64_t k = 0; k < w.activation_group; k += LANES) {
                const Ints magnitude = (Ints)load(x + k) & splat(0x7fffffff);
                top = magnitude > top ? magnitude : top;
            }
            const int32_t bits = largest(top);
            float amax;
            memcpy(&amax, &bits, 4);
            const float inverse = amax > 0 ? 127.0f / amax : 0.0f;
            Words sums{};  // unsigned: what NaN becomes may overflow
            for (int64_t k = 0; k < w.activation_group; k += LANES) {
                const Floats rounded = fma(load(x + k), splat(inverse), shift);
                const Words v = (Words)rounded - (Words)shift;
                sums += v;
                store_bytes(q + k, (Ints)v);
            }
            *scale = bits < 0x7f800000 ? amax / 127.0f : NAN;  // NaN and infinity must show in the logits
            totals = fma(to_float((Ints)sums), splat(*scale++), totals);
        }
        *total = sum(totals);
    }
}

INLINE int32_t four(const int8_t* q) {
    int32_t v;
    memcpy(&v, q, 4);
    return v;
}

// The dot products of R rows with V vectors of a block's outputs, for the inputs from q to end. p: the first vector's
// weights; q and p are moved on. INT4 and NARROW: no more inputs than that.
template <int KIND, int R, int V>
INLINE void dots_of(const int8_t*& q, const int8_t* end, int64_t inputs, const uint8_t*& p, Ints (&dots)[R][V]) {
    // inputs k .. k+3 of each eight, and k+4 .. k+7; for one row, more independent sums hide the latency
    constexpr bool APART = R == 1, IN_16_BITS = KIND == INT4 && NARROW > 0;
    const auto add = [](Ints acc, Bytes weights, int32_t x) __attribute__((always_inline)) {
        return IN_16_BITS ? narrow_dot4(acc, weights, x) : dot4<KIND == INT4>(acc, weights, x);
    };
    Ints others[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < V; h++) dots[r][h] = others[r][h] = splat(0);
    for (; q < end; q += 8, p += KIND == INT4 ? 128 : 256) {
        if (R > 1)  // for one row the processor's own prefetching is enough
            for (int ahead = 0; ahead < (KIND == INT4 ? 128 : 256); ahead += 64) __builtin_prefetch(p + 4096 + ahead);
        Bytes weights[V];
        UNROLL for (int h = 0; h < V; h++) {
            weights[h] = load_as<Bytes>(p + 4 * LANES * h);
            if (KIND == INT4) weights[h] &= 15;
        }
        UNROLL for (int r = 0; r < R; r++) {
            const int32_t x = four(q + r * inputs);
            UNROLL for (int h = 0; h < V; h++) dots[r][h] = add(dots[r][h], weights[h], x);
        }
        UNROLL for (int h = 0; h < V; h++) {
            if (KIND == INT4) weights[h] = (Bytes)(load_as<Words>(p + 4 * LANES * h) >> 4) & 15;
            else weights[h] = load_as<Bytes>(p + 128 + 4 * LANES * h);
        }
        UNROLL for (int r = 0; r < R; r++) {
            const int32_t x = four(q + r * inputs + 4);
            UNROLL for (int h = 0; h < V; h++) {
                if (APART) others[r][h] = add(others[r][h], weights[h], x);
                else dots[r][h] = add(dots[r][h], weights[h], x);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < V; h++) {
            if (IN_16_BITS) dots[r][h] = widened(dots[r][h]);
            if (APART) dots[r][h] += IN_16_BITS ? widened(others[r][h]) : others[r][h];
        }
}

// R rows against V vectors of one block of outputs, from vector `first` on. to: the results of the block's outputs for
// the first of the rows, `stride` floats per row.
template <int KIND, int R, int V>
static void block_rows(const LinearSpec& w, int64_t block, int first, const Activations& a, int64_t row, float* to,
                       int64_t stride) {
    const int64_t groups = w.inputs / w.group, bytes = group_bytes(KIND, w.group), run = w.activation_group;
    const int64_t most = KIND == INT4 && NARROW ? std::min(NARROW, run) : run;
    const uint8_t* data = w.data + block * groups * bytes;
    const uint8_t* zeros = KIND == INT4 ? w.zeros + block * groups * BLOCK : nullptr;
    Floats result[R][V];
    const int8_t* q = a.q + row * a.inputs;
    const int64_t scales = w.inputs / run;
    const float *scale_of = a.scale + row * scales, *total_of = a.total + row * groups;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < V; h++) result[r][h] = splat(0.0f);
    for (int64_t g = 0; g < groups; g++, data += bytes, total_of++) {
        Floats sums[R][V];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int h = 0; h < V; h++) sums[r][h] = splat(0.0f);
        const uint8_t* p = data + 2 * BLOCK + 4 * LANES * first;
        for (const int8_t* group_end = q + w.group; q < group_end; scale_of++) {
            const int8_t* run_end = q + run;
            Ints dots[R][V];
            dots_of<KIND, R, V>(q, q + most, a.inputs, p, dots);
            if (KIND == INT4 && NARROW)
                while (q < run_end) {
                    Ints further[R][V];
                    dots_of<KIND, R, V>(q, std::min(run_end, q + most), a.inputs, p, further);
                    for (int r = 0; r < R; r++)
                        for (int h = 0; h < V; h++) dots[r][h] += further[r][h];
                }
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int h = 0; h < V; h++)
                    // integers below 2^24: exact in float
                    sums[r][h] = fma(to_float(dots[r][h]), splat(scale_of[r * scales]), sums[r][h]);
        }
        UNROLL for (int h = 0; h < V; h++) {
            const Floats scale = load_half((const uint16_t*)data + LANES * (first + h));
            const Floats zero = KIND == INT4 ? load_u8(zeros + g * BLOCK + LANES * (first + h)) : splat(128.0f);
            UNROLL for (int r = 0; r < R; r++)
                result[r][h] = fma(fma(zero, splat(-total_of[r * groups]), sums[r][h]), scale, result[r][h]);
        }
    }
    const int64_t left = w.outputs - block * BLOCK - LANES * first;
    if (left <= 0) return;
    UNROLL for (int r = 0; r < R; r++, to += stride) {
        if (left >= LANES * V) {
            UNROLL for (int h = 0; h < V; h++) store(to + LANES * (first + h), result[r][h]);
        } else {
            memcpy(to + LANES * first, &result[r][0], 4 * left);
        }
    }
}

// R rows against one block: of many rows, as many vectors at once as there are registers for their sums.
template <int KIND, int R>
static void block_rows(const LinearSpec& w, int64_t block, const Activations& a, int64_t row, float* to, int64_t stride) {
    constexpr int V = R > 2 ? 2 : VECTORS;
    for (int first = 0; first < VECTORS; first += V) block_rows<KIND, R, V>(w, block, first, a, row, to, stride);
}

// All rows against one block of 32 outputs. to: its results for the first row, `stride` floats per row.
template <int KIND>
static void block_all_rows(const LinearSpec& w, int64_t block, const Activations& a, float* to, int64_t stride) {
    for (int64_t row = 0, many; row < a.rows; row += many, to += many * stride) {
        const int64_t left = a.rows - row;
        many = left >= MANY ? MANY : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (many == MANY) block_rows<KIND, MANY>(w, block, a, row, to, stride);
        else if (many == 4) block_rows<KIND, 4>(w, block, a, row, to, stride);
        else if (many == 2) block_rows<KIND, 2>(w, block, a, row, to, stride);
        else block_rows<KIND, 1>(w, block, a, row, to, stride);
    }
}

// R rows against C consecutive outputs of a bf16 weight, in float32.
template <int C, int R>
static void bf16_tile(const uint16_t* w, int64_t inputs, const float* x, float* out, int64_t stride) {
    Floats acc[C][R];
    UNROLL for (int c = 0; c < C; c++) UNROLL for (int r = 0; r < R; r++) acc[c][r] = splat(0.0f);
    const int64_t whole = inputs & ~(LANES - 1);
    for (int64_t k = 0; k < whole; k += LANES) {
        // the processor's own prefetching makes little of several short rows at once
        if (R == 1 && C > 1)
            for (int line = 0; line < C * LANES; line += 32) __builtin_prefetch(w + C * k + 6144 + line);
        Floats weights[C];
        UNROLL for (int c = 0; c < C; c++) weights[c] = load_bf16(w + c * inputs + k);
        UNROLL for (int r = 0; r < R; r++) {
            const Floats v = load(x + r * inputs + k);
            UNROLL for (int c = 0; c < C; c++) acc[c][r] = fma(weights[c], v, acc[c][r]);
        }
    }
    for (int c = 0; c < C; c++)
        for (int r = 0; r < R; r++) {
            float total = sum(acc[c][r]);
            for (int64_t k = whole; k < inputs; k++) total += float_of(w[c * inputs + k]) * x[r * inputs + k];
            out[r * stride + c] = total;
        }
}
// R rows against `count` outputs: with the many sums of several rows, as many outputs at once as there are registers.
template <int R>
static void bf16_rows(const uint16_t* w, int64_t count, int64_t inputs, const float* x, float* out, int64_t stride) {
    constexpr int C = R > 4 && LANES < 16 ? 2 : 4;
    int64_t n = 0;
    for (; n + C <= count; n += C) bf16_tile<C, R>(w + n * inputs, inputs, x, out + n, stride);
    for (; n < count; n++) bf16_tile<1, R>(w + n * inputs, inputs, x, out + n, stride);
}

constexpr int64_t MOST_APART = 16;  // blocks of an item of `run_apart`

// A linear times some rows, or one part of a bf16 linear, in items of work that threads take in any order.
struct Product {
    const LinearSpec* w;
    const uint16_t* part;  // of bf16, row-major
    int64_t count;         // outputs of the part; blocks of an integer linear
    Activations a;
    float* out;  // [rows, outputs], `stride` floats per row
    int64_t stride, step, items;

    void run(int64_t item) const {
        const int64_t first = item * step, end = std::min(count, first + step);
        if (w->kind != BF16) {
            for (int64_t b = first; b < end; b++)
                if (w->kind == INT4) block_all_rows<INT4>(*w, b, a, out + b * BLOCK, stride);
                else block_all_rows<INT8>(*w, b, a, out + b * BLOCK, stride);
            return;
        }
        const uint16_t* from = part + first * w->inputs;
        float* to = out + first;
        for (int64_t r = 0, many; r < a.rows; r += many) {
            const int64_t left = a.rows - r;
            many = left >= 6 ? 6 : left >= 3 ? 3 : left;
            const float* x = a.x + r * a.inputs;
            if (many == 6) bf16_rows<6>(from, end - first, w->inputs, x, to + r * stride, stride);
            else if (many == 3) bf16_rows<3>(from, end - first, w->inputs, x, to + r * stride, stride);
            else if (many == 2) bf16_rows<2>(from, end - first, w->inputs, x, to + r * stride, stride);
            else bf16_rows<1>(from, end - first, w->inputs, x, to + r * stride, stride);
        }
    }

    // Of an integer linear whose rows lie so far apart that they fall into the same places of the caches: first into
    // near memory. finish(row, first output, results, count): called for each part of a row before it is copied.
    template <class Finish> void run_apart(int64_t item, const Finish& finish) const {
        constexpr int64_t ROWS = 24;
        const int64_t first = item * step, end = std::min(count, first + step), width = (end - first) * BLOCK;
        const int64_t real = std::min(width, w->outputs - first * BLOCK);
        float near[ROWS * MOST_APART * BLOCK];
        for (int64_t row = 0; row < a.rows; row += ROWS) {
            const Activations some = rows_of(a, *w, row, std::min(ROWS, a.rows - row));
            for (int64_t b = first; b < end; b++)
                if (w->kind == INT4) block_all_rows<INT4>(*w, b, some, near + (b - first) * BLOCK, width);
                else block_all_rows<INT8>(*w, b, some, near + (b - first) * BLOCK, width);
            for (int64_t r = 0; r < some.rows; r++) {
                finish(row + r, first * BLOCK, near + r * width, real);
                memcpy(out + (row + r) * stride + first * BLOCK, near + r * width, 4 * real);
            }
        }
    }
};

// Writes the products of a linear to `to`, at most MAX_PARTS; returns how many there are.
static int products_of(const LinearSpec& w, const Activations& a, float* out, int64_t stride, int threads, Product* to) {
    if (w.kind != BF16) {
        const int64_t blocks = blocks_of(w.outputs), bytes = (w.inputs / w.group) * group_bytes(w.kind, w.group);
        const int64_t step = std::max<int64_t>(1, std::min<int64_t>(131072 / bytes, blocks / (4 * threads)));
        *to = {&w, nullptr, blocks, a, out, stride, step, (blocks + step - 1) / step};
        return 1;
    }
    int parts = 0;
    for (; parts < MAX_PARTS && w.part_rows[parts]; out += w.part_rows[parts++]) {
        const int64_t rows = w.part_rows[parts];
        const int64_t step = std::max<int64_t>(4, (std::min<int64_t>(65536 / w.inputs, rows / (4 * threads)) + 3) & ~3);
        to[parts] = {&w, w.parts[parts], rows, a, out, stride, step, (rows + step - 1) / step};
    }
    return parts;
}

// A product of an integer linear in items for `run_apart`.
static Product product_apart(const LinearSpec& w, const Activations& a, float* out, int64_t stride, int threads) {
    const int64_t blocks = blocks_of(w.outputs);
    const int64_t step = std::max<int64_t>(1, std::min(MOST_APART, blocks / (4 * threads)));
    return {&w, nullptr, blocks, a, out, stride, step, (blocks + step - 1) / step};
}

// The items of all products together.
static void run_products(Pool& pool, const Product* products, int64_t count) {
    int64_t items = 0;
    for (int64_t p = 0; p < count; p++) items += products[p].items;
    pool.run(items, [&](int64_t item, int) {
        const Product* p = products;
        for (; item >= p->items; p++) item -= p->items;
        p->run(item);
    });
}

// out: [rows, outputs], `stride` floats per row.
static void apply(Pool& pool, const LinearSpec& w, const Activations& a, float* out, int64_t stride) {
    Product products[MAX_PARTS];
    run_products(pool, products, products_of(w, a, out, stride, pool.threads(), products));
}
