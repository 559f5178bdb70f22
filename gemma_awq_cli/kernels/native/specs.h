// The structures that the caller passes, and a description of them. structures.py mirrors them field by field and
// compares its own offsets and sizes with `layout_text` when it loads the library.
#pragma once

#include "attention.h"
#include "by_input.h"
#include "linear.h"

#include <cstddef>
#include <string>

// Linears whose kind says nothing (`outputs` 0) and null pointers stand for what a layer or a model does not have. Norms
// are gains in float32.

// The experts of a layer.
struct ExpertsSpec {
    int64_t count, active, intermediate;
    LinearSpec router;  // [count] scores
    const float* router_gain;  // of the norm before the router
    const float* scale;        // [count]
    const float* norm;         // before the experts
    const float* post_norm;    // after their sum
    const float* dense_norm;   // after the MLP beside them
    const LinearSpec* gate_up;  // [count]
    const LinearSpec* down;     // [count]
};

// What a layer of a model with several streams has, and its low-rank linears beside attention (Laurel).
struct AltUpSpec {
    const float* router;        // [streams, hidden]
    const float* router_gain;   // of the norm before the router
    const float* prediction;    // [streams * streams, streams]
    const float* correction;    // [streams, streams]
    const float* output_scale;  // [hidden]: of the active stream, for the per-layer input; or null
    LinearSpec laurel_left, laurel_right;
    const float* laurel_norm;
};

constexpr int64_t MAX_STREAMS = 8;

// One decoder layer. Layers may differ in every size but the hidden one.
struct LayerSpec {
    int64_t heads, kv_heads, head_dim, intermediate;
    int64_t window;     // tokens that a query sees, itself included; 0: all before it
    int64_t kv_buffer;  // where keys and values of new tokens are: 0 if no other layer reads them
    int32_t reads_kv;   // whether they are those that an earlier layer with the same buffer and cache left there
    int32_t keys_are_values;  // whether values are the keys before norm and rotation
    int32_t value_norm;
    int32_t sparse_gate;  // whether the gate is cut off at its mean and `gate_cut` standard deviations
    float gate_cut;
    float scalar;  // what the layer's output is multiplied by
    LinearSpec qkv, o, gate_up, down;
    LinearSpec per_layer_gate, per_layer_projection;
    const float* input_norm;
    const float* attention_norm;
    const float* mlp_norm;
    const float* post_mlp_norm;
    const float* q_norm;
    const float* k_norm;
    const float* per_layer_norm;
    const float* inv_freq;  // [head_dim / 2]; layers with the same pointer have the same factor and share their angles
    float rope_factor;
    float query_scale;
    const ExpertsSpec* experts;
    const AltUpSpec* altup;
};

struct ModelSpec {
    int64_t hidden, layers;
    int64_t kv_buffers;  // see LayerSpec
    int64_t first_kv_reader;  // from this layer on only tokens whose logits are wanted pass
    float eps, embed_scale, attention_softcap, final_softcap;  // a soft-cap of 0: none
    const uint16_t* embedding;
    const float* norm;
    LinearSpec head;
    const LayerSpec* layer;
    const uint16_t* exact;  // the head in 16 bits, from which a coarse head's largest logits are recomputed, or null
    // The per-layer inputs: channels per layer (0: none), and rows of the table [rows, layers * width] in bf16; tokens
    // beyond it have the first.
    int64_t per_layer_width, per_layer_rows;
    const uint16_t* per_layer_table;
    LinearSpec per_layer_projection;  // hidden -> layers * width, in bf16
    const float* per_layer_gain;
    int64_t streams, active_stream;  // 0 streams: the hidden states are one
    const LinearSpec* stream_starts;  // [streams - 1]: what makes the others of the first
    const LinearSpec* stream_ends;    // [streams - 1]: what is undone before all are one again
};

// The KV cache: for each layer a pointer to [R, kv_heads, slots, head_dim] bf16, the same for layers that
// share it.
struct CacheSpec {
    uint8_t* const* keys;
    uint8_t* const* values;
    const int64_t* slots;
    int32_t kind;  // BF16, or INT8: see held.h
};

// Tokens of one row, positions start .. start + count - 1; `offset` is where they begin in the flat batch.
struct ChunkSpec {
    int64_t row, start, count, offset;
};

// Lines of "Structure size", "Structure.field offset size" and "CONSTANT value".
inline std::string layout_text() {
    std::string text;
    const auto line = [&text](const char* name, std::initializer_list<size_t> numbers) {
        text += name;
        for (const size_t number : numbers) text += " " + std::to_string(number);
        text += "\n";
    };
#define STRUCTURE(S) line(#S, {sizeof(S)})
#define FIELD(S, F) line(#S "." #F, {offsetof(S, F), sizeof(S::F)})
#define CONSTANT(C) line(#C, {(size_t)C})
    STRUCTURE(LinearSpec);
    FIELD(LinearSpec, kind);
    FIELD(LinearSpec, group);
    FIELD(LinearSpec, activation_group);
    FIELD(LinearSpec, inputs);
    FIELD(LinearSpec, outputs);
    FIELD(LinearSpec, data);
    FIELD(LinearSpec, zeros);
    FIELD(LinearSpec, parts);
    FIELD(LinearSpec, part_rows);
    STRUCTURE(ExpertsSpec);
    FIELD(ExpertsSpec, count);
    FIELD(ExpertsSpec, active);
    FIELD(ExpertsSpec, intermediate);
    FIELD(ExpertsSpec, router);
    FIELD(ExpertsSpec, router_gain);
    FIELD(ExpertsSpec, scale);
    FIELD(ExpertsSpec, norm);
    FIELD(ExpertsSpec, post_norm);
    FIELD(ExpertsSpec, dense_norm);
    FIELD(ExpertsSpec, gate_up);
    FIELD(ExpertsSpec, down);
    STRUCTURE(AltUpSpec);
    FIELD(AltUpSpec, router);
    FIELD(AltUpSpec, router_gain);
    FIELD(AltUpSpec, prediction);
    FIELD(AltUpSpec, correction);
    FIELD(AltUpSpec, output_scale);
    FIELD(AltUpSpec, laurel_left);
    FIELD(AltUpSpec, laurel_right);
    FIELD(AltUpSpec, laurel_norm);
    STRUCTURE(LayerSpec);
    FIELD(LayerSpec, heads);
    FIELD(LayerSpec, kv_heads);
    FIELD(LayerSpec, head_dim);
    FIELD(LayerSpec, intermediate);
    FIELD(LayerSpec, window);
    FIELD(LayerSpec, kv_buffer);
    FIELD(LayerSpec, reads_kv);
    FIELD(LayerSpec, keys_are_values);
    FIELD(LayerSpec, value_norm);
    FIELD(LayerSpec, sparse_gate);
    FIELD(LayerSpec, gate_cut);
    FIELD(LayerSpec, scalar);
    FIELD(LayerSpec, qkv);
    FIELD(LayerSpec, o);
    FIELD(LayerSpec, gate_up);
    FIELD(LayerSpec, down);
    FIELD(LayerSpec, per_layer_gate);
    FIELD(LayerSpec, per_layer_projection);
    FIELD(LayerSpec, input_norm);
    FIELD(LayerSpec, attention_norm);
    FIELD(LayerSpec, mlp_norm);
    FIELD(LayerSpec, post_mlp_norm);
    FIELD(LayerSpec, q_norm);
    FIELD(LayerSpec, k_norm);
    FIELD(LayerSpec, per_layer_norm);
    FIELD(LayerSpec, inv_freq);
    FIELD(LayerSpec, rope_factor);
    FIELD(LayerSpec, query_scale);
    FIELD(LayerSpec, experts);
    FIELD(LayerSpec, altup);
    STRUCTURE(ModelSpec);
    FIELD(ModelSpec, hidden);
    FIELD(ModelSpec, layers);
    FIELD(ModelSpec, kv_buffers);
    FIELD(ModelSpec, first_kv_reader);
    FIELD(ModelSpec, eps);
    FIELD(ModelSpec, embed_scale);
    FIELD(ModelSpec, attention_softcap);
    FIELD(ModelSpec, final_softcap);
    FIELD(ModelSpec, embedding);
    FIELD(ModelSpec, norm);
    FIELD(ModelSpec, head);
    FIELD(ModelSpec, layer);
    FIELD(ModelSpec, exact);
    FIELD(ModelSpec, per_layer_width);
    FIELD(ModelSpec, per_layer_rows);
    FIELD(ModelSpec, per_layer_table);
    FIELD(ModelSpec, per_layer_projection);
    FIELD(ModelSpec, per_layer_gain);
    FIELD(ModelSpec, streams);
    FIELD(ModelSpec, active_stream);
    FIELD(ModelSpec, stream_starts);
    FIELD(ModelSpec, stream_ends);
    STRUCTURE(CacheSpec);
    FIELD(CacheSpec, keys);
    FIELD(CacheSpec, values);
    FIELD(CacheSpec, slots);
    FIELD(CacheSpec, kind);
    STRUCTURE(ChunkSpec);
    FIELD(ChunkSpec, row);
    FIELD(ChunkSpec, start);
    FIELD(ChunkSpec, count);
    FIELD(ChunkSpec, offset);
    CONSTANT(INT4);
    CONSTANT(INT8);
    CONSTANT(BF16);
    CONSTANT(INT4_BY_INPUT);
    CONSTANT(BLOCK);
    CONSTANT(PADDED);
    CONSTANT(MAX_PARTS);
    CONSTANT(MAX_HEAD_DIM);
    CONSTANT(MAX_STREAMS);
    CONSTANT(HELD_GROUP);
#undef STRUCTURE
#undef FIELD
#undef CONSTANT
    return text;
}
