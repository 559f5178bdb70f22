// How a key or a value of one head is held: in bf16, or in 8 bits with a scale for each 32 numbers behind them.
#pragma once

#include "linear.h"

constexpr int64_t HELD_GROUP = 32;

// Bytes of one key or value of `d` numbers.
INLINE int64_t held_bytes(int kind, int64_t d) {
    return kind == INT8 ? d + 4 * ((d + HELD_GROUP - 1) / HELD_GROUP) : 2 * d;
}

template <int KIND> INLINE Floats load_held(const uint8_t* held, int64_t c, int64_t d) {
    if (KIND == BF16) return load_bf16((const uint16_t*)held + c);
    float scale;
    memcpy(&scale, held + d + 4 * (c / HELD_GROUP), 4);
    return (load_u8(held + c) - splat(128.0f)) * scale;
}

// Numbers [d], d a multiple of LANES.
static void store_held(int kind, uint8_t* held, const float* x, int64_t d) {
    if (kind != INT8) {
        for (int64_t c = 0; c < d; c += LANES) store_bf16((uint16_t*)held + c, load(x + c));
        return;
    }
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t c = 0; c < d; c += HELD_GROUP) {
        const int64_t end = std::min(d, c + HELD_GROUP);
        Ints top = splat(0);  // of the bits of magnitudes, which are ordered as the numbers are, and NaN above all
        for (int64_t i = c; i < end; i += LANES) {
            const Ints magnitude = (Ints)load(x + i) & splat(0x7fffffff);
            top = magnitude > top ? magnitude : top;
        }
        const int32_t bits = largest(top);
        float amax;
        memcpy(&amax, &bits, 4);
        const float inverse = amax > 0 ? 127.0f / amax : 0.0f, scale = bits < 0x7f800000 ? amax / 127.0f : NAN;
        for (int64_t i = c; i < end; i += LANES) {
            const Words v = (Words)fma(load(x + i), splat(inverse), shift) - (Words)shift;
            store_bytes((int8_t*)held + i, (Ints)(v + 128));
        }
        memcpy(held + d + 4 * (c / HELD_GROUP), &scale, 4);
    }
}
