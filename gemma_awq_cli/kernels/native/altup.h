// Alternating updates (AltUp): several streams of hidden states, of which a layer computes with one and corrects all.
#pragma once

#include "norm.h"
#include "specs.h"

// How much each stream goes into the others, in -1 .. 1. x: [hidden]; room: [hidden]; out: [streams].
static void stream_weights(const AltUpSpec& a, const ModelSpec& m, const float* x, float* room, float* out) {
    rms_norm(x, a.router_gain, m.hidden, m.eps, room);
    for (int64_t s = 0; s < m.streams; s++) {
        float total = 0;
        Floats sums = splat(0.0f);
        const float* row = a.router + s * m.hidden;
        const int64_t whole = m.hidden & ~(LANES - 1);
        for (int64_t i = 0; i < whole; i += LANES) sums = fma(load(row + i), load(room + i), sums);
        for (int64_t i = whole; i < m.hidden; i++) total += row[i] * room[i];
        out[s] = std::tanh(total + sum(sums));
    }
}

// streams [streams, hidden] of one token become what they are predicted to be after the layer. room: [hidden].
static void predict(const AltUpSpec& a, const ModelSpec& m, float* streams, float* room) {
    const int64_t n = m.streams;
    float weights[MAX_STREAMS], mix[MAX_STREAMS * MAX_STREAMS];
    stream_weights(a, m, streams + m.active_stream * m.hidden, room, weights);
    for (int64_t c = 0; c < n * n; c++) {  // mix[to * n + from]
        mix[c] = 0;
        for (int64_t s = 0; s < n; s++) mix[c] += a.prediction[c * n + s] * weights[s];
    }
    for (int64_t i = 0; i < m.hidden; i++) {
        float old[MAX_STREAMS];
        for (int64_t s = 0; s < n; s++) old[s] = streams[s * m.hidden + i];
        for (int64_t to = 0; to < n; to++) {
            float total = 0;
            for (int64_t s = 0; s < n; s++) total += old[s] * mix[to * n + s];
            streams[to * m.hidden + i] = old[to] + total;
        }
    }
}

// Corrects the predicted streams of one token by the layer's result x [hidden] for the active one. room: [hidden].
static void correct(const AltUpSpec& a, const ModelSpec& m, const float* x, float* streams, float* room) {
    const int64_t n = m.streams;
    float weights[MAX_STREAMS];
    stream_weights(a, m, x, room, weights);
    const float* active = streams + m.active_stream * m.hidden;
    for (int64_t i = 0; i < m.hidden; i++) room[i] = x[i] - active[i];
    for (int64_t s = 0; s < n; s++) {
        float factor = 1;
        for (int64_t from = 0; from < n; from++) factor += a.correction[s * n + from] * weights[from];
        float* stream = streams + s * m.hidden;
        for (int64_t i = 0; i < m.hidden; i++) stream[i] += room[i] * factor;
    }
}

// The mean square of a row.
static float mean_square(const float* x, int64_t n) {
    Floats squares = splat(0.0f);
    const int64_t whole = n & ~(LANES - 1);
    for (int64_t i = 0; i < whole; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (int64_t i = whole; i < n; i++) total += x[i] * x[i];
    return total / (float)n;
}

// What makes x as large as `like`.
static float magnitude_ratio(const float* x, const float* like, int64_t n) {
    return std::sqrt(mean_square(like, n)) / std::sqrt(std::max(mean_square(x, n), 1e-5f));
}
