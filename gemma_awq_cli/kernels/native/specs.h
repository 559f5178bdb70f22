// The structures that the caller passes, and a description of them. structures.py mirrors them field by field and
// compares its own offsets and sizes with `layout_text` when it loads the library.
#pragma once

#include "attention.h"
#include "linear.h"

#include <cstddef>
#include <string>

// One decoder layer. Layers may differ in every size but the hidden one. Norms are gains in float32; a null one is
// absent.
struct LayerSpec {
    int64_t heads, kv_heads, head_dim, intermediate;
    int64_t window;  // tokens that a query sees, itself included; 0: all before it
    LinearSpec qkv, o, gate_up, down;
    const float* input_norm;
    const float* attention_norm;
    const float* mlp_norm;
    const float* post_mlp_norm;
    const float* q_norm;
    const float* k_norm;
    const float* inv_freq;  // [head_dim / 2]; layers with the same pointer have the same factor and share their angles
    float rope_factor;
    float query_scale;
};

struct ModelSpec {
    int64_t hidden, layers;
    float eps, embed_scale, attention_softcap, final_softcap;  // a soft-cap of 0: none
    const uint16_t* embedding;
    const float* norm;
    LinearSpec head;
    const LayerSpec* layer;
    const uint16_t* exact;  // the head in 16 bits, from which a coarse head's largest logits are recomputed, or null
};

// The KV cache: for each layer a pointer to [R, kv_heads, slots, head_dim] bf16.
struct CacheSpec {
    uint16_t* const* keys;
    uint16_t* const* values;
    const int64_t* slots;
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
    FIELD(LinearSpec, inputs);
    FIELD(LinearSpec, outputs);
    FIELD(LinearSpec, data);
    FIELD(LinearSpec, zeros);
    FIELD(LinearSpec, parts);
    FIELD(LinearSpec, part_rows);
    STRUCTURE(LayerSpec);
    FIELD(LayerSpec, heads);
    FIELD(LayerSpec, kv_heads);
    FIELD(LayerSpec, head_dim);
    FIELD(LayerSpec, intermediate);
    FIELD(LayerSpec, window);
    FIELD(LayerSpec, qkv);
    FIELD(LayerSpec, o);
    FIELD(LayerSpec, gate_up);
    FIELD(LayerSpec, down);
    FIELD(LayerSpec, input_norm);
    FIELD(LayerSpec, attention_norm);
    FIELD(LayerSpec, mlp_norm);
    FIELD(LayerSpec, post_mlp_norm);
    FIELD(LayerSpec, q_norm);
    FIELD(LayerSpec, k_norm);
    FIELD(LayerSpec, inv_freq);
    FIELD(LayerSpec, rope_factor);
    FIELD(LayerSpec, query_scale);
    STRUCTURE(ModelSpec);
    FIELD(ModelSpec, hidden);
    FIELD(ModelSpec, layers);
    FIELD(ModelSpec, eps);
    FIELD(ModelSpec, embed_scale);
    FIELD(ModelSpec, attention_softcap);
    FIELD(ModelSpec, final_softcap);
    FIELD(ModelSpec, embedding);
    FIELD(ModelSpec, norm);
    FIELD(ModelSpec, head);
    FIELD(ModelSpec, layer);
    FIELD(ModelSpec, exact);
    STRUCTURE(CacheSpec);
    FIELD(CacheSpec, keys);
    FIELD(CacheSpec, values);
    FIELD(CacheSpec, slots);
    STRUCTURE(ChunkSpec);
    FIELD(ChunkSpec, row);
    FIELD(ChunkSpec, start);
    FIELD(ChunkSpec, count);
    FIELD(ChunkSpec, offset);
    CONSTANT(INT4);
    CONSTANT(INT8);
    CONSTANT(BF16);
    CONSTANT(BLOCK);
    CONSTANT(MAX_PARTS);
    CONSTANT(MAX_HEAD_DIM);
#undef STRUCTURE
#undef FIELD
#undef CONSTANT
    return text;
}
