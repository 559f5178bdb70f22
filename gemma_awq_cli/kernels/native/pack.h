// Packing into the layout of linear.h: AutoAWQ's tensors, and bf16 weights that are quantized on the way.
#pragma once

#include "linear.h"

// q[32][g] (values 0..15 or 0..255) -> one group of a block.
template <int KIND> static void place(const uint8_t (*q)[256], int64_t group, uint8_t* to) {
    for (int64_t k = 0; k < group; k += KIND == INT4 ? 8 : 4)
        for (int lane = 0; lane < BLOCK; lane++, to += 4) {
            uint32_t bytes, high = 0;
            memcpy(&bytes, &q[lane][k], 4);
            if (KIND == INT4) memcpy(&high, &q[lane][k + 4], 4);
            bytes |= high << 4;  // no byte is larger than 15, so no bit is carried into the next byte
            memcpy(to, &bytes, 4);
        }
}

// qweight [K, N/8], qzeros [K/g, N/8] int32, scales [K/g, N] float16 -> `data` and `zeros`.
static void pack_awq(Pool& pool, const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales, int64_t inputs,
                     int64_t outputs, int64_t group, uint8_t* data, uint8_t* zeros) {
    static const int column[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // that nibble i holds
    const int64_t groups = inputs / group, bytes = group_bytes(INT4, group), words = outputs / 8;
    pool.run(blocks_of(outputs), [&](int64_t b, int) {
        uint8_t q[BLOCK][256];
        const int64_t real = std::min<int64_t>(BLOCK, outputs - b * BLOCK);
        memset(q, 0, sizeof q);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = b * groups + g;
            uint8_t* to = data + at * bytes;
            memset(to, 0, 2 * BLOCK);
            memset(zeros + at * BLOCK, 0, BLOCK);
            memcpy(to, scales + g * outputs + b * BLOCK, 2 * real);
            for (int64_t word = 0; word < real / 8; word++) {
                const uint32_t z = qzeros[g * words + b * BLOCK / 8 + word];
                for (int i = 0; i < 8; i++) zeros[at * BLOCK + 8 * word + column[i]] = z >> (4 * i) & 15;
                for (int64_t k = 0; k < group; k++) {
                    const uint32_t w = qweight[(g * group + k) * words + b * BLOCK / 8 + word];
                    for (int i = 0; i < 8; i++) q[8 * word + column[i]][k] = w >> (4 * i) & 15;
                }
            }
            place<INT4>(q, group, to + 2 * BLOCK);
        }
    });
}

// The nearest integers, ties to even, within low .. high, which are less than 2^22 in size.
INLINE Ints rounded(Floats v, float low, float high) {
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23
    return (Ints)(smaller(larger(v, splat(low)), splat(high)) + shift) - (Ints)shift;
}

// One group of one output to 8 bits, symmetric, stored + 128. Returns the scale's float16.
static uint16_t quantize8(const float* x, int64_t group, uint8_t* q) {
    Floats top = splat(0.0f);
    for (int64_t k = 0; k < group; k += LANES) top = larger(top, absolute(load(x + k)));
    const uint16_t half = half_of(largest(top) / 127.0f);
    const float scale = half_to_float(half), inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int64_t k = 0; k < group; k += LANES)
        store_bytes((int8_t*)q + k, rounded(load(x + k) * inverse, -127.0f, 127.0f) + 128);
    return half;
}

// One group of one output to 4 bits with a zero point: of three ranges, the one with the least squared error. Returns
// the scale's float16.
static uint16_t quantize4(const float* x, int64_t group, uint8_t* q, uint8_t* zero) {
    constexpr int TRIES = 3;
    Floats lows = splat(0.0f), highs = splat(0.0f);
    for (int64_t k = 0; k < group; k += LANES) {
        const Floats v = load(x + k);
        lows = smaller(lows, v), highs = larger(highs, v);
    }
    const float low = -largest(splat(0.0f) - lows), high = largest(highs);
    uint16_t halves[TRIES];
    float scales[TRIES], inverses[TRIES], zeros[TRIES];
    Floats errors[TRIES];
    for (int step = 0; step < TRIES; step++) {
        const float shrink = 1.0f - 0.07f * step;
        halves[step] = half_of((high - low) * shrink / 15.0f);
        scales[step] = half_to_float(halves[step]);
        inverses[step] = scales[step] > 0 ? 1.0f / scales[step] : 0.0f;
        zeros[step] = std::min(15.0f, std::max(0.0f, std::nearbyint(-low * shrink * inverses[step])));
        errors[step] = splat(0.0f);
    }
    for (int64_t k = 0; k < group; k += LANES) {  // all tries side by side: each waits for its own last result
        const Floats v = load(x + k);
        for (int step = 0; step < TRIES; step++) {
            const Floats z = splat(zeros[step]);
            const Floats level = to_float(rounded(fma(v, splat(inverses[step]), z), 0.0f, 15.0f));
            const Floats off = (level - z) * scales[step] - v;
            errors[step] = fma(off, off, errors[step]);
        }
    }
    float best = INFINITY;
    uint16_t chosen = 0;
    *zero = 0;
    for (int step = 0; step < TRIES && scales[step] > 0; step++) {
        const float total = sum(errors[step]);
        if (total < best) best = total, chosen = halves[step], *zero = (uint8_t)zeros[step];
    }
    const float scale = half_to_float(chosen), inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int64_t k = 0; k < group; k += LANES)
        store_bytes((int8_t*)q + k, rounded(fma(load(x + k), splat(inverse), splat((float)*zero)), 0.0f, 15.0f));
    return chosen;
}

// A bf16 weight [N, K], row-major -> int4 or int8 blocks.
template <int KIND>
static void quantize_weight(Pool& pool, const uint16_t* weight, int64_t inputs, int64_t outputs, int64_t group,
                            uint8_t* data, uint8_t* zeros) {
    const int64_t groups = inputs / group, bytes = group_bytes(KIND, group);
    pool.run(blocks_of(outputs), [&](int64_t b, int) {
        uint8_t q[BLOCK][256];
        float x[256];
        memset(q, KIND == INT4 ? 0 : 128, sizeof q);
        const int64_t real = std::min<int64_t>(BLOCK, outputs - b * BLOCK);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = b * groups + g;
            uint16_t* scales = (uint16_t*)(data + at * bytes);
            memset(scales, 0, 2 * BLOCK);
            if (KIND == INT4) memset(zeros + at * BLOCK, 0, BLOCK);
            for (int64_t lane = 0; lane < real; lane++) {
                const uint16_t* from = weight + (b * BLOCK + lane) * inputs + g * group;
                for (int64_t k = 0; k < group; k += LANES) store(x + k, load_bf16(from + k));
                scales[lane] = KIND == INT4 ? quantize4(x, group, q[lane], zeros + at * BLOCK + lane)
                                            : quantize8(x, group, q[lane]);
            }
            place<KIND>(q, group, data + at * bytes + 2 * BLOCK);
        }
    });
}
