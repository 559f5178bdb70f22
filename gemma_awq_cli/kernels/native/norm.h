// RMSNorm, and sums of rows.
#pragma once

#include "vec.h"

// gain: [n], or null for none. out may be x.
static void rms_norm(const float* x, const float* gain, int64_t n, float eps, float* out) {
    Floats squares = splat(0.0f);
    const int64_t whole = n & ~(LANES - 1);
    for (int64_t i = 0; i < whole; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (int64_t i = whole; i < n; i++) total += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(total / (float)n + eps);
    if (!gain) {
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor;
        return;
    }
    for (int64_t i = 0; i < whole; i += LANES) store(out + i, load(x + i) * factor * load(gain + i));
    for (int64_t i = whole; i < n; i++) out[i] = x[i] * factor * gain[i];
}

static void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}
