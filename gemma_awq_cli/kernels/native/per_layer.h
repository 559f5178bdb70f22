// Per-layer inputs: each layer gets a row of its own for every token, from a table and from the embedded token.
#pragma once

#include "norm.h"
#include "specs.h"

// The input of layer `index` for one token. projected: [width], the layer's projection of the embedded token; out:
// [width].
static void per_layer_input(const ModelSpec& m, int64_t index, int64_t token, const float* projected, float* out) {
    const int64_t width = m.per_layer_width, row = token < m.per_layer_rows ? token : 0;
    const uint16_t* stored = m.per_layer_table + (row * m.layers + index) * width;
    const float shrink = 1.0f / std::sqrt((float)m.hidden), scale = std::sqrt((float)width), half = std::sqrt(0.5f);
    for (int64_t i = 0; i < width; i++) out[i] = projected[i] * shrink;
    rms_norm(out, m.per_layer_gain, width, m.eps, out);
    for (int64_t i = 0; i < width; i++) out[i] = (out[i] + float_of(stored[i]) * scale) * half;
}

// gate [width] becomes GELU(gate) times the layer's input.
static void gate_per_layer(float* gate, const float* input, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) store(gate + i, gelu_tanh(load(gate + i)) * load(input + i));
}

// The part of the model's projection that belongs to layers first .. last - 1.
static LinearSpec projection_of(const ModelSpec& m, int64_t first, int64_t last) {
    LinearSpec part = m.per_layer_projection;
    part.parts[0] += first * m.per_layer_width * part.inputs;
    part.outputs = part.part_rows[0] = (last - first) * m.per_layer_width;
    return part;
}
