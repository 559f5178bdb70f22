// The forward of a language model over a flat batch of tokens, in one call. Arithmetic between the linears is float32;
// keys and values are kept in bf16 or in 8 bits. models/forward/torch_decoder.py is the same forward in torch, and its
// oracle.

#include "altup.h"
#include "attention.h"
#include "by_input.h"
#include "columns.h"
#include "descent.h"
#include "elements.h"
#include "experts.h"
#include "leading.h"
#include "norm.h"
#include "pack.h"
#include "per_layer.h"
#include "products.h"
#include "refine.h"
#include "specs.h"
#include "tiles.h"

#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// One call at a time: there is one set of threads and one of buffers.
static std::mutex one_call;
static std::unique_ptr<Pool> the_pool;
static Pool& pool_of(int threads) {
    if (!the_pool || the_pool->threads() != threads) the_pool = std::make_unique<Pool>(threads);
    return *the_pool;
}

// The tokens of a chunk that are in the flat batch: `count` of them from `offset` on, the first of which is the chunk's
// token number `first`.
struct Queries {
    int64_t offset, first, count;
};

// Kept from call to call and only ever grown, so that a token allocates nothing.
struct Buffers {
    std::vector<float> x, normed, mixed, qkv, attended, gate_up, act, scale, total, cosine, sine;
    std::vector<int8_t> q;
    std::vector<std::vector<uint8_t>> k, v;  // of new tokens, by LayerSpec.kv_buffer
    std::vector<int64_t> position_of;
    std::vector<int32_t> ids;
    std::vector<Queries> queries;
    std::vector<Seen> seen;     // of each block of keys
    std::vector<float> values;  // likewise
    std::vector<float> early_inputs, late_inputs, narrow, input;  // per-layer inputs
    std::vector<float> streams, laurel;                           // AltUp
    Nonzero nonzero;
    ExpertBuffers experts;
    std::vector<float> tops;  // of the logits: see refine.h
    std::vector<Refined> refined;
};
static Buffers the_buffers;
template <class T> static void at_least(std::vector<T>& v, int64_t size) {
    if ((int64_t)v.size() < size) v.resize(size);
}

// The rotary embedding in place. cosine, sine: of the angles, [D / 2].
static void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

// Cuts a row off at its mean and some standard deviations, and subtracts that: most of it becomes zero.
static void cut_gate(float* gate, int64_t n, float deviations) {
    Floats sums = splat(0.0f), squares = splat(0.0f);
    for (int64_t i = 0; i < n; i += LANES) sums += load(gate + i);
    const float mean = sum(sums) / (float)n;
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats off = load(gate + i) - mean;
        squares = fma(off, off, squares);
    }
    const Floats cut = splat(mean + deviations * std::sqrt(sum(squares) / (float)n)), none = splat(0.0f);
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats above = load(gate + i) - cut;
        store(gate + i, above < none ? none : above);
    }
}

// The largest sizes that any layer has: the buffers fit all layers.
struct Widths {
    int64_t half_head = 0, query = 0, kv = 0, qkv = 0, intermediate = 0, laurel = 0;
    explicit Widths(const ModelSpec& model) {
        for (int64_t i = 0; i < model.layers; i++) {
            const LayerSpec& l = model.layer[i];
            half_head = std::max(half_head, l.head_dim / 2);
            query = std::max(query, l.heads * l.head_dim);
            kv = std::max(kv, l.kv_heads * l.head_dim);
            qkv = std::max(qkv, l.qkv.outputs);
            intermediate = std::max(intermediate, l.intermediate);
            if (l.altup) laurel = std::max(laurel, l.altup->laurel_left.outputs);
        }
    }
};

class Forward {
  public:
    Forward(const ModelSpec& model, Pool& threads, const CacheSpec& kv_cache, const ChunkSpec* chunk_specs,
            int64_t chunk_count, const int32_t* token_ids, int64_t token_count)
        : m(model), b(the_buffers), pool(threads), cache(kv_cache), chunks(chunk_specs), nchunks(chunk_count),
          ids(token_ids), tokens(token_count) {
        const Widths most(m);
        const int64_t widest = std::max({m.hidden, most.intermediate, most.query});
        at_least(b.x, tokens * m.hidden);
        at_least(b.normed, tokens * m.hidden);
        at_least(b.mixed, tokens * m.hidden);
        at_least(b.qkv, tokens * most.qkv);
        at_least(b.attended, tokens * most.query);
        at_least(b.gate_up, tokens * 2 * most.intermediate);
        at_least(b.act, tokens * most.intermediate);
        at_least(b.q, tokens * widest);
        at_least(b.scale, tokens * (widest / 16 + 1));
        at_least(b.total, tokens * (widest / 16 + 1));
        at_least(b.k, m.kv_buffers);
        at_least(b.v, m.kv_buffers);
        for (int64_t i = 0; i < m.kv_buffers; i++) {
            at_least(b.k[i], 2 * tokens * most.kv);
            at_least(b.v[i], 2 * tokens * most.kv);
        }
        at_least(b.cosine, tokens * most.half_head);
        at_least(b.sine, tokens * most.half_head);
        at_least(b.narrow, tokens * std::max(m.per_layer_width, most.laurel));
        at_least(b.input, tokens * m.per_layer_width);
        at_least(b.streams, tokens * m.streams * m.hidden);
        if (m.streams) at_least(b.laurel, tokens * m.hidden);
    }

    // logits: [sum of wanted, V], those after the last wanted[chunk] tokens of each chunk, in that order.
    void run(const int64_t* wanted, float* logits) {
        at_least(b.position_of, tokens);
        at_least(b.ids, tokens);
        at_least(b.queries, nchunks);
        for (int64_t p = 0; p < nchunks; p++) {
            b.queries[p] = {chunks[p].offset, 0, chunks[p].count};
            for (int64_t i = 0; i < chunks[p].count; i++) b.position_of[chunks[p].offset + i] = chunks[p].start + i;
        }
        embed();
        if (m.per_layer_width) project_inputs(wanted);
        if (m.streams) start_streams();
        for (int64_t l = 0; l < m.layers && tokens; l++) {
            if (l == m.first_kv_reader) keep_wanted(wanted);
            if (tokens) layer(m.layer[l], l);
        }
        // Only now: a reader's tokens may have seen what the ring overwrites.
        for (int64_t l = 0; m.kv_buffers > 1 && l < m.first_kv_reader; l++)
            if (m.layer[l].kv_buffer) write_cache(m.layer[l], l);
        if (m.first_kv_reader >= m.layers) keep_wanted(wanted);
        if (!tokens) return;
        if (m.streams) join_streams();
        head(logits);
    }

  private:
    // Calls body(t) for each token: on this thread for one token, on all threads for more.
    template <class Body> void each_token(const Body& body) { each_of(tokens, body); }
    template <class Body> void each_of(int64_t rows, const Body& body) {
        if (rows == 1) return body(0);
        const int64_t step = std::max<int64_t>(1, rows / (4 * pool.threads()));
        pool.run((rows + step - 1) / step, [&](int64_t item, int) {
            for (int64_t t = item * step; t < std::min(rows, (item + 1) * step); t++) body(t);
        });
    }

    void embed() {
        for (int64_t t = 0; t < tokens; t++) {
            b.ids[t] = ids[t];
            const uint16_t* from = m.embedding + (int64_t)ids[t] * m.hidden;
            for (int64_t i = 0; i < m.hidden; i++)
                b.x[t * m.hidden + i] = float_of(from[i]) * m.embed_scale;
        }
    }

    // Calls body(from, to) for each token that is wanted: its place in the batch, and among the wanted.
    template <class Body> int64_t each_wanted(const int64_t* wanted, const Body& body) {
        int64_t to = 0;
        for (int64_t p = 0; p < nchunks; p++)
            for (int64_t i = chunks[p].count - wanted[p]; i < chunks[p].count; i++) body(chunks[p].offset + i, to++);
        return to;
    }

    // Drops the tokens whose logits are not wanted: what follows leaves nothing behind that later tokens read.
    void keep_wanted(const int64_t* wanted) {
        const int64_t h = m.hidden, all = m.streams * h;
        tokens = each_wanted(wanted, [&](int64_t from, int64_t to) {
            if (from == to) return;
            memcpy(&b.x[to * h], &b.x[from * h], 4 * h);
            if (all) memcpy(&b.streams[to * all], &b.streams[from * all], 4 * all);
            b.position_of[to] = b.position_of[from];
            b.ids[to] = b.ids[from];
        });
        for (int64_t p = 0, to = 0; p < nchunks; to += wanted[p++])
            b.queries[p] = {to, chunks[p].count - wanted[p], wanted[p]};
        tabled = nullptr;
    }

    // The projections of the embedded tokens that are part of the per-layer inputs: of all tokens for the layers that all
    // tokens pass, of the wanted ones for the others.
    void project_inputs(const int64_t* wanted) {
        const int64_t h = m.hidden, early = m.first_kv_reader * m.per_layer_width;
        const int64_t late = m.layers * m.per_layer_width - early;
        at_least(b.early_inputs, tokens * early);
        if (early) apply(pool, projection_of(m, 0, m.first_kv_reader), activations(b.x.data(), tokens, h), b.early_inputs.data(), early);
        if (!late) return;
        const int64_t rows = each_wanted(
            wanted, [&](int64_t from, int64_t to) { memcpy(&b.normed[to * h], &b.x[from * h], 4 * h); });
        at_least(b.late_inputs, rows * late);
        if (rows) apply(pool, projection_of(m, m.first_kv_reader, m.layers), activations(b.normed.data(), rows, h), b.late_inputs.data(), late);
    }

    const float* projected(int64_t index, int64_t t) const {
        const int64_t width = m.per_layer_width, first = m.first_kv_reader;
        return index < first ? &b.early_inputs[(t * first + index) * width]
                             : &b.late_inputs[(t * (m.layers - first) + index - first) * width];
    }

    float* stream(int64_t t, int64_t s) { return &b.streams[(t * m.streams + s) * m.hidden]; }

    // All streams from the embedded tokens, in b.x.
    void start_streams() {
        const int64_t h = m.hidden;
        each_token([&](int64_t t) { memcpy(stream(t, 0), &b.x[t * h], 4 * h); });
        for (int64_t s = 1; s < m.streams; s++) {
            apply(pool, m.stream_starts[s - 1], activations(b.x.data(), tokens, h), b.mixed.data(), h);
            each_token([&](int64_t t) {
                const float ratio = magnitude_ratio(&b.mixed[t * h], &b.x[t * h], h);
                for (int64_t i = 0; i < h; i++) stream(t, s)[i] = b.mixed[t * h + i] * ratio;
            });
        }
    }

    // b.x from all streams.
    void join_streams() {
        const int64_t h = m.hidden;
        each_token([&](int64_t t) { memcpy(&b.x[t * h], stream(t, 0), 4 * h); });
        for (int64_t s = 1; s < m.streams; s++) {
            each_token([&](int64_t t) { memcpy(&b.normed[t * h], stream(t, s), 4 * h); });
            apply(pool, m.stream_ends[s - 1], activations(b.normed.data(), tokens, h), b.mixed.data(), h);
            each_token([&](int64_t t) {
                const float ratio = magnitude_ratio(&b.mixed[t * h], stream(t, 0), h);
                for (int64_t i = 0; i < h; i++) b.x[t * h + i] += b.mixed[t * h + i] * ratio;
            });
        }
        for (int64_t i = 0; i < tokens * h; i++) b.x[i] /= (float)m.streams;
    }

    Activations activations(const float* x, int64_t rows, int64_t inputs) {
        return {rows, inputs, x, b.q.data(), b.scale.data(), b.total.data()};
    }

    void angles(const LayerSpec& l) {
        if (l.inv_freq == tabled) return;
        tabled = l.inv_freq;
        const int64_t half = l.head_dim / 2;
        each_token([&](int64_t t) {
            for (int64_t i = 0; i < half; i++) {
                const float angle = (float)b.position_of[t] * l.inv_freq[i];
                b.cosine[t * half + i] = std::cos(angle) * l.rope_factor;
                b.sine[t * half + i] = std::sin(angle) * l.rope_factor;
            }
        });
    }

    void layer(const LayerSpec& l, int64_t index) {
        angles(l);
        attention(l, index);
        mlp(l);
        if (m.per_layer_width) add_input(l, index);
        if (l.scalar != 1.0f)
            each_token([&](int64_t t) {
                for (int64_t i = 0; i < m.hidden; i++) b.x[t * m.hidden + i] *= l.scalar;
            });
    }

    // Up to the norm before the MLP, which it leaves in b.normed.
    void attention(const LayerSpec& l, int64_t index) {
        const int64_t h = m.hidden, d = l.head_dim, q_size = l.heads * d, qkv_size = l.qkv.outputs;
        const Activations in = activations(b.normed.data(), tokens, h);
        each_token([&](int64_t t) {
            if (l.altup) {
                predict(*l.altup, m, stream(t, 0), &b.normed[t * h]);
                memcpy(&b.x[t * h], stream(t, m.active_stream), 4 * h);
            }
            rms_norm(&b.x[t * h], l.input_norm, h, m.eps, &b.normed[t * h]);
            if (l.qkv.kind != BF16) quantize_row(in, t, l.qkv);
        });
        apply(pool, l.qkv, in, b.qkv.data(), qkv_size);
        if (l.altup) {
            const int64_t rank = l.altup->laurel_left.outputs;
            apply(pool, l.altup->laurel_left, in, b.narrow.data(), rank);
            apply(pool, l.altup->laurel_right, activations(b.narrow.data(), tokens, rank), b.laurel.data(), h);
        }
        each_token([&](int64_t t) {
            float* row = &b.qkv[t * qkv_size];
            const float* cosine = &b.cosine[t * (d / 2)];
            const float* sine = &b.sine[t * (d / 2)];
            if (!l.reads_kv) keep_values(l, row, t);
            for (int64_t n = 0; n < l.heads + (l.reads_kv ? 0 : l.kv_heads); n++) {
                float* x = row + n * d;
                const bool query = n < l.heads;
                if (l.q_norm) rms_norm(x, query ? l.q_norm : l.k_norm, d, m.eps, x);
                rotate(x, cosine, sine, d / 2);
                if (query)
                    for (int64_t i = 0; i < d; i++) x[i] *= l.query_scale;
            }
            if (l.reads_kv) return;
            for (int64_t n = 0; n < l.kv_heads; n++)
                store_held(cache.kind, held(b.k, l, t, n), row + q_size + n * d, d);
        });
        attend(l, index);
        const Activations attended = activations(b.attended.data(), tokens, q_size);
        if (l.o.kind != BF16) each_token([&](int64_t t) { quantize_row(attended, t, l.o); });
        apply(pool, l.o, attended, b.mixed.data(), h);
        each_token([&](int64_t t) {
            float* mixed = &b.mixed[t * h];
            float* x = &b.x[t * h];
            if (l.attention_norm) rms_norm(mixed, l.attention_norm, h, m.eps, mixed);
            add(x, mixed, h);
            if (l.altup) {
                float* laurel = &b.laurel[t * h];
                rms_norm(laurel, l.altup->laurel_norm, h, m.eps, laurel);
                for (int64_t i = 0; i < h; i++) x[i] = (x[i] + (b.normed[t * h + i] + laurel[i])) * std::sqrt(0.5f);
            }
            rms_norm(x, l.mlp_norm, h, m.eps, &b.normed[t * h]);
            if (l.gate_up.kind != BF16) quantize_row(in, t, l.gate_up);
        });
    }

    // The values of one token, from its row of the linear's outputs in which the keys are still as they came.
    void keep_values(const LayerSpec& l, const float* row, int64_t t) {
        const int64_t d = l.head_dim, kv_size = l.kv_heads * d;
        const float* values = row + l.heads * d + (l.keys_are_values ? 0 : kv_size);
        float normed[MAX_HEAD_DIM];
        for (int64_t n = 0; n < l.kv_heads; n++, values += d) {
            const float* head = values;
            if (l.value_norm) {
                rms_norm(values, nullptr, d, m.eps, normed);
                head = normed;
            }
            store_held(cache.kind, held(b.v, l, t, n), head, d);
        }
    }

    // The key or the value of one of the new tokens.
    uint8_t* held(std::vector<std::vector<uint8_t>>& buffers, const LayerSpec& l, int64_t t, int64_t kv_head) const {
        return &buffers[l.kv_buffer][(t * l.kv_heads + kv_head) * held_bytes(cache.kind, l.head_dim)];
    }

    void mlp(const LayerSpec& l) {
        const int64_t h = m.hidden, wide = l.intermediate;
        apply(pool, l.gate_up, activations(b.normed.data(), tokens, h), b.gate_up.data(), 2 * wide);
        const Activations act = activations(b.act.data(), tokens, wide);
        each_token([&](int64_t t) {
            float* gate = &b.gate_up[t * 2 * wide];
            float* out = &b.act[t * wide];
            if (l.sparse_gate) cut_gate(gate, wide, l.gate_cut);
            for (int64_t i = 0; i < wide; i += LANES)
                store(out + i, gelu_tanh(load(gate + i)) * load(gate + wide + i));
            if (l.down.kind != BF16) quantize_row(act, t, l.down);
        });
        if (l.down.kind == INT4_BY_INPUT) apply_by_input(pool, l.down, act, b.nonzero, b.mixed.data());
        else apply(pool, l.down, act, b.mixed.data(), h);
        if (l.experts) run_experts(*l.experts);
        each_token([&](int64_t t) {
            float* mixed = &b.mixed[t * h];
            if (l.experts) {
                rms_norm(mixed, l.experts->dense_norm, h, m.eps, mixed);
                add(mixed, &b.normed[t * h], h);
            }
            if (l.post_mlp_norm) rms_norm(mixed, l.post_mlp_norm, h, m.eps, mixed);
            add(&b.x[t * h], mixed, h);
            if (l.altup) correct(*l.altup, m, &b.x[t * h], stream(t, 0), &b.normed[t * h]);
        });
    }

    // The experts' sum for the states b.x, normed, in b.normed.
    void run_experts(const ExpertsSpec& e) {
        ExpertBuffers& x = b.experts;
        const int64_t h = m.hidden, wide = e.intermediate, choices = tokens * e.active;
        const bool packed = e.gate_up->kind != BF16;
        const int64_t scales = packed ? h / e.gate_up->activation_group : 0, totals = packed ? h / e.gate_up->group : 0;
        at_least(x.scores, tokens * e.count);
        at_least(x.weight, choices);
        at_least(x.chosen, choices);
        at_least(x.place, choices);
        at_least(x.gate_up, choices * 2 * wide);
        at_least(x.act, choices * wide);
        at_least(x.down, choices * h);
        if (packed) {
            at_least(x.q, choices * h);
            at_least(x.scale, choices * scales);
            at_least(x.total, choices * totals);
            at_least(x.act_q, choices * wide);
            at_least(x.act_scale, choices * (wide / e.down->activation_group));
            at_least(x.act_total, choices * (wide / e.down->group));
        } else {
            at_least(x.x, choices * h);
        }
        const Activations in = activations(b.normed.data(), tokens, h);
        each_token([&](int64_t t) { rms_norm(&b.x[t * h], e.router_gain, h, m.eps, &b.normed[t * h]); });
        apply(pool, e.router, in, x.scores.data(), e.count);
        each_token([&](int64_t t) {
            choose_experts(e, &x.scores[t * e.count], &x.chosen[t * e.active], &x.weight[t * e.active]);
            rms_norm(&b.x[t * h], e.norm, h, m.eps, &b.normed[t * h]);
            if (packed) quantize_row(in, t, *e.gate_up);
        });
        sort_by_expert(x.chosen, choices, e.count, x.first, x.place);
        each_token([&](int64_t t) {
            for (int64_t c = t * e.active; c < (t + 1) * e.active; c++) {
                const int64_t to = x.place[c];
                if (packed) {
                    memcpy(&x.q[to * h], in.q + t * h, h);
                    memcpy(&x.scale[to * scales], in.scale + t * scales, 4 * scales);
                    memcpy(&x.total[to * totals], in.total + t * totals, 4 * totals);
                } else {
                    memcpy(&x.x[to * h], in.x + t * h, 4 * h);
                }
            }
        });
        products_of_experts(e, e.gate_up, {choices, h, x.x.data(), x.q.data(), x.scale.data(), x.total.data()},
                            x.gate_up.data(), 2 * wide);
        const Activations act{choices, wide, x.act.data(), x.act_q.data(), x.act_scale.data(), x.act_total.data()};
        each_of(choices, [&](int64_t row) {
            const float* gate = &x.gate_up[row * 2 * wide];
            float* out = &x.act[row * wide];
            for (int64_t i = 0; i < wide; i += LANES)
                store(out + i, gelu_tanh(load(gate + i)) * load(gate + wide + i));
            if (packed) quantize_row(act, row, *e.down);
        });
        products_of_experts(e, e.down, act, x.down.data(), h);
        each_token([&](int64_t t) {
            float* to = &b.normed[t * h];
            memset(to, 0, 4 * h);
            for (int64_t c = t * e.active; c < (t + 1) * e.active; c++) {
                const float* from = &x.down[x.place[c] * h];
                for (int64_t i = 0; i < h; i++) to[i] += from[i] * x.weight[c];
            }
            rms_norm(to, e.post_norm, h, m.eps, to);
        });
    }

    // Each expert's linear with its rows of sorted activations.
    void products_of_experts(const ExpertsSpec& e, const LinearSpec* linears, const Activations& a, float* out,
                             int64_t stride) {
        std::vector<Product>& products = b.experts.products;
        products.clear();
        for (int64_t i = 0; i < e.count; i++) {
            const int64_t first = b.experts.first[i], rows = b.experts.first[i + 1] - first;
            if (!rows) continue;
            const Activations own = rows_of(a, linears[i], first, rows);
            Product parts[MAX_PARTS];
            const int count = products_of(linears[i], own, out + first * stride, stride, pool.threads(), parts);
            products.insert(products.end(), parts, parts + count);
        }
        run_products(pool, products.data(), (int64_t)products.size());
    }

    // Adds what the layer makes of the token's per-layer input: to the states, or to all streams but the first.
    void add_input(const LayerSpec& l, int64_t index) {
        const int64_t h = m.hidden, width = m.per_layer_width;
        if (l.altup)
            each_token([&](int64_t t) {
                memcpy(&b.normed[t * h], stream(t, m.active_stream), 4 * h);
                if (l.altup->output_scale)
                    for (int64_t i = 0; i < h; i++) b.normed[t * h + i] *= l.altup->output_scale[i];
            });
        const float* from = l.altup ? b.normed.data() : b.x.data();
        apply(pool, l.per_layer_gate, activations(from, tokens, h), b.narrow.data(), width);
        each_token([&](int64_t t) {
            per_layer_input(m, index, b.ids[t], projected(index, t), &b.input[t * width]);
            gate_per_layer(&b.narrow[t * width], &b.input[t * width], width);
        });
        apply(pool, l.per_layer_projection, activations(b.narrow.data(), tokens, width), b.mixed.data(), h);
        each_token([&](int64_t t) {
            float* mixed = &b.mixed[t * h];
            rms_norm(mixed, l.per_layer_norm, h, m.eps, mixed);
            if (!l.altup) return add(&b.x[t * h], mixed, h);
            for (int64_t s = 1; s < m.streams; s++) add(stream(t, s), mixed, h);
        });
    }

    // Queries of one kv head, of consecutive tokens of a chunk, and the blocks of keys that they see.
    struct Tile {
        int64_t chunk, first, count, head, heads;  // the chunk's queries first ..; query heads head ..
        int64_t block, end;                        // of KEY_BLOCK positions
        int64_t queries() const { return count * heads; }
    };

    void attend(const LayerSpec& l, int64_t index) {
        if (cache.kind == INT8) attend_held<INT8>(l, index);
        else attend_held<BF16>(l, index);
        // Only now: the first tokens of this batch may have seen what the ring overwrites.
        if (!l.kv_buffer) write_cache(l, index);
    }

    template <int KIND> void attend_held(const LayerSpec& l, int64_t index) {
        const std::vector<Tile> tiles = tiles_of(l);
        int64_t blocks = 0;
        for (const Tile& t : tiles) blocks += t.end - t.block;
        if ((int64_t)tiles.size() < 2 * pool.threads() && blocks > (int64_t)tiles.size())
            return attend_by_block<KIND>(l, index, tiles, blocks);
        // tiles that follow each other read the same keys, which stay in the processor's cache meanwhile
        const int64_t most = (int64_t)tiles.size() / (4 * pool.threads());
        const int64_t together = std::max<int64_t>(1, std::min<int64_t>(MAX_TILES, most));
        pool.run(((int64_t)tiles.size() + together - 1) / together, [&](int64_t item, int) {
            const Tile* first = &tiles[item * together];
            const int64_t count = std::min(together, (int64_t)tiles.size() - item * together);
            Seen seen[MAX_TILES * MAX_QUERIES] = {}, next[MAX_QUERIES];
            float values[MAX_QUERIES * MAX_HEAD_DIM];
            int64_t block = first->block, end = first->end;
            for (const Tile* t = first; t < first + count; t++)
                block = std::min(block, t->block), end = std::max(end, t->end);
            for (; block < end; block++)
                for (int64_t n = 0; n < count; n++) {
                    const Tile& t = first[n];
                    if (block < t.block || block >= t.end) continue;
                    meet_block<KIND>(t, l, index, block, next, values);
                    for (int64_t i = 0; i < t.queries(); i++)
                        merge(seen[n * MAX_QUERIES + i], result(t, l, i), next[i], values + i * l.head_dim, l.head_dim);
                }
            for (int64_t n = 0; n < count; n++)
                for (int64_t i = 0; i < first[n].queries(); i++)
                    finish(seen[n * MAX_QUERIES + i], result(first[n], l, i), l.head_dim);
        });
    }

    // Few tiles and many keys: the threads share out the blocks.
    template <int KIND>
    void attend_by_block(const LayerSpec& l, int64_t index, const std::vector<Tile>& tiles, int64_t blocks) {
        const int64_t d = l.head_dim, size = MAX_QUERIES * d;
        struct Item {
            int64_t tile, block;
        };
        std::vector<Item> items;
        std::vector<int64_t> first_of;  // of each tile's items
        for (int64_t n = 0; n < (int64_t)tiles.size(); n++) {
            first_of.push_back((int64_t)items.size());
            for (int64_t block = tiles[n].block; block < tiles[n].end; block++) items.push_back({n, block});
        }
        at_least(b.seen, blocks * MAX_QUERIES);
        at_least(b.values, blocks * size);
        pool.run(blocks, [&](int64_t i, int) {
            const Tile& t = tiles[items[i].tile];
            meet_block<KIND>(t, l, index, items[i].block, &b.seen[i * MAX_QUERIES], &b.values[i * size]);
        });
        pool.run((int64_t)tiles.size() * MAX_QUERIES, [&](int64_t item, int) {
            const int64_t n = item / MAX_QUERIES, i = item % MAX_QUERIES;
            const Tile& t = tiles[n];
            if (i >= t.queries()) return;
            Seen seen = {};
            for (int64_t at = first_of[n]; at < first_of[n] + t.end - t.block; at++)
                merge(seen, result(t, l, i), b.seen[at * MAX_QUERIES + i], &b.values[at * size + i * d], d);
            finish(seen, result(t, l, i), d);
        });
    }

    std::vector<Tile> tiles_of(const LayerSpec& l) {
        const int64_t shared = l.heads / l.kv_heads;
        int64_t heads = std::min<int64_t>(shared, MAX_QUERIES), met = 0;  // heads that read the same keys, in each tile
        for (int64_t p = 0; p < nchunks; p++) {
            const int64_t last = chunks[p].start + b.queries[p].first + b.queries[p].count - 1;
            if (b.queries[p].count)
                met += l.kv_heads * b.queries[p].count * (last / KEY_BLOCK + 1 - oldest(l, last) / KEY_BLOCK);
        }
        while (heads > 1 && met * (shared / heads) < 2 * pool.threads()) heads = (heads + 1) / 2;  // work for all threads
        const int64_t step = MAX_QUERIES / heads;
        std::vector<Tile> tiles;
        for (int64_t p = 0; p < nchunks; p++) {
            const Queries& asking = b.queries[p];
            for (int64_t kv = 0; kv < l.kv_heads; kv++)
                for (int64_t h = 0; h < shared; h += heads)
                    for (int64_t first = 0; first < asking.count; first += step) {
                        const int64_t count = std::min(step, asking.count - first);
                        const int64_t position = chunks[p].start + asking.first + first;  // of the first query
                        tiles.push_back({p, first, count, kv * shared + h, std::min(heads, shared - h),
                                         oldest(l, position) / KEY_BLOCK, (position + count - 1) / KEY_BLOCK + 1});
                    }
        }
        return tiles;
    }

    // The position of the oldest key that a query sees.
    static int64_t oldest(const LayerSpec& l, int64_t position) {
        return l.window ? std::max<int64_t>(0, position - l.window + 1) : 0;
    }

    // Where the result of a tile's query goes.
    float* result(const Tile& t, const LayerSpec& l, int64_t i) {
        const int64_t token = b.queries[t.chunk].offset + t.first + i / t.heads, head = t.head + i % t.heads;
        return &b.attended[(token * l.heads + head) * l.head_dim];
    }

    static void finish(const Seen& seen, float* values, int64_t d) {
        const float inverse = 1.0f / seen.total;
        for (int64_t c = 0; c < d; c += LANES) store(values + c, load(values + c) * inverse);
    }

    // What the queries of a tile see of a block of keys: seen [queries], values [queries, D].
    template <int KIND>
    void meet_block(const Tile& t, const LayerSpec& l, int64_t index, int64_t block, Seen* seen, float* values) {
        const ChunkSpec& chunk = chunks[t.chunk];
        const Queries& asking = b.queries[t.chunk];
        const int64_t d = l.head_dim, slots = cache.slots[index], kv = t.head / (l.heads / l.kv_heads);
        const int64_t bytes = held_bytes(KIND, d), base = (chunk.row * l.kv_heads + kv) * slots * bytes;
        const int64_t position = chunk.start + asking.first + t.first;  // of the first query
        const int64_t low = std::max(block * KEY_BLOCK, oldest(l, position));
        const int64_t high = std::min((block + 1) * KEY_BLOCK, position + t.count);
        Run runs[3];
        int nruns = 0;
        int64_t p = low;
        while (p < std::min(high, chunk.start)) {
            const int64_t count = std::min(std::min(high, chunk.start) - p, slots - p % slots);
            const int64_t at = base + p % slots * bytes;
            runs[nruns++] = {cache.keys[index] + at, cache.values[index] + at, bytes, count};
            p += count;
        }
        if (p < high) {
            const int64_t fresh = chunk.offset + p - chunk.start;
            runs[nruns++] = {held(b.k, l, fresh, kv), held(b.v, l, fresh, kv), l.kv_heads * bytes, high - p};
        }
        const float* q[MAX_QUERIES];
        int64_t first[MAX_QUERIES], last[MAX_QUERIES];
        for (int64_t i = 0; i < t.queries(); i++) {
            const int64_t token = asking.offset + t.first + i / t.heads, own = position + i / t.heads;
            q[i] = &b.qkv[token * l.qkv.outputs + (t.head + i % t.heads) * d];
            first[i] = std::max(oldest(l, own), low) - low;
            last[i] = std::min(own + 1, high) - low;
        }
        meet<KIND>({q, first, last, t.queries()}, runs, nruns, d, m.attention_softcap, seen, values);
    }

    // Writes keys and values of the new tokens into the layer's cache.
    void write_cache(const LayerSpec& l, int64_t index) {
        const int64_t slots = cache.slots[index], bytes = held_bytes(cache.kind, l.head_dim);
        for (int64_t p = 0; p < nchunks; p++)
            for (int64_t i = std::max<int64_t>(0, chunks[p].count - slots); i < chunks[p].count; i++)
                for (int64_t kv = 0; kv < l.kv_heads; kv++) {
                    const int64_t slot = (chunks[p].start + i) % slots, t = chunks[p].offset + i;
                    const int64_t to = ((chunks[p].row * l.kv_heads + kv) * slots + slot) * bytes;
                    memcpy(cache.keys[index] + to, held(b.k, l, t, kv), bytes);
                    memcpy(cache.values[index] + to, held(b.v, l, t, kv), bytes);
                }
    }

    void head(float* logits) {
        const int64_t outputs = m.head.outputs, blocks = blocks_of(outputs);
        const Activations in = activations(b.normed.data(), tokens, m.hidden);
        each_token([&](int64_t t) {
            rms_norm(&b.x[t * m.hidden], m.norm, m.hidden, m.eps, &b.normed[t * m.hidden]);
            if (m.head.kind != BF16) quantize_row(in, t, m.head);
        });
        if (m.head.kind == BF16) {
            apply(pool, m.head, in, logits, outputs);
            if (!(m.final_softcap > 0)) return;
            const int64_t all = tokens * outputs, step = 16384;
            pool.run((all + step - 1) / step, [&](int64_t item, int) {
                for (int64_t i = item * step; i < std::min(all, (item + 1) * step); i++)
                    logits[i] = soft_cap(logits[i], m.final_softcap);
            });
            return;
        }
        at_least(b.tops, tokens * blocks);
        at_least(b.refined, tokens);
        const Product product = product_apart(m.head, in, logits, outputs, pool.threads());
        pool.run(product.items, [&](int64_t item, int) {
            product.run_apart(item, [&](int64_t row, int64_t first, float* part, int64_t count) {
                if (m.final_softcap > 0) {
                    int64_t i = 0;
                    // the exact function takes a twentieth of a token's time; it is for the logits that are made exact
                    for (; m.exact && i + LANES <= count; i += LANES)
                        store(part + i, soft_cap(load(part + i), m.final_softcap));
                    for (; i < count; i++) part[i] = soft_cap(part[i], m.final_softcap);
                }
                if (m.exact)
                    for (int64_t i = 0; i < count; i += BLOCK)
                        b.tops[row * blocks + (first + i) / BLOCK] = top_of(part + i, std::min<int64_t>(BLOCK, count - i));
            });
        });
        if (!m.exact) return;
        for (int64_t t = 0; t < tokens; t++) {
            b.refined[t].logits = logits + t * outputs;
            b.refined[t].tops = &b.tops[t * blocks];
        }
        refine(pool, m.exact, m.hidden, outputs, m.final_softcap, b.normed.data(), b.refined, tokens);
    }

    const ModelSpec& m;
    Buffers& b;
    Pool& pool;
    const CacheSpec& cache;
    const ChunkSpec* chunks;
    const int64_t nchunks;
    const int32_t* ids;
    int64_t tokens;  // that still pass
    const float* tabled = nullptr;  // the inv_freq whose angles are in the buffers
};

#pragma GCC visibility push(default)
extern "C" {

// The hash of the sources of a prebuilt library; empty of one that is compiled where it runs.
const char* gaq_sources() {
#if defined(GAQ_SOURCES)
    return GAQ_SOURCES;
#else
    return "";
#endif
}

// The compiler, whose choices change the last bits of sums.
const char* gaq_compiler() {
#if defined(__VERSION__)
    return __VERSION__;
#else
    return "unknown";
#endif
}

// The instruction set that the arithmetic was compiled for.
const char* gaq_instructions() {
#if defined(__AVX512VNNI__)
    return "AVX-512 VNNI";
#elif defined(__AVXVNNI__)
    return "AVX-VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return "NEON i8mm";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "NEON dot products";
#else
    return "";  // portable C++: correct, but slower than PyTorch's own kernels
#endif
}

// A description of the structures and constants: see layout_text in specs.h.
const char* gaq_layout() {
    static const std::string text = layout_text();
    return text.c_str();
}

void gaq_forward(const ModelSpec* model, const CacheSpec* cache, const ChunkSpec* chunks, int64_t nchunks,
                 const int32_t* ids, int64_t tokens, const int64_t* wanted, float* logits, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    Forward(*model, pool_of(threads), *cache, chunks, nchunks, ids, tokens).run(wanted, logits);
}

// See leading.h.
void gaq_leading(const float* logits, int64_t rows, int64_t entries, int64_t count, float* values, int32_t* tokens,
                 int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    leading(pool_of(threads), logits, rows, entries, count, values, tokens);
}

// Asks for large pages for weights that are not written yet: a token reads all of them once, page by page.
void gaq_large_pages(uint8_t* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, first = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t last = ((uintptr_t)memory + bytes) & ~(page - 1);
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);  // a refusal costs only speed
#else
    (void)memory, (void)bytes;
#endif
}

// x [rows, K] float32 -> out [rows, N] float32
void gaq_linear(const LinearSpec* linear, const float* x, int64_t rows, float* out, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    std::vector<int8_t> q(rows * linear->inputs);
    std::vector<float> scale(rows * (linear->inputs / 16 + 1)), total(rows * (linear->inputs / 16 + 1));
    const Activations a{rows, linear->inputs, x, q.data(), scale.data(), total.data()};
    if (linear->kind != BF16)
        for (int64_t r = 0; r < rows; r++) quantize_row(a, r, *linear);
    Nonzero nonzero;
    if (linear->kind == INT4_BY_INPUT) apply_by_input(pool_of(threads), *linear, a, nonzero, out);
    else apply(pool_of(threads), *linear, a, out, linear->outputs);
}

// kind: INT4 or INT4_BY_INPUT
void gaq_pack_awq(int32_t kind, const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales, int64_t inputs,
                  int64_t outputs, int64_t group, uint8_t* data, uint8_t* zeros, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    const auto pack = kind == INT4 ? pack_awq : pack_by_input;
    pack(pool_of(threads), qweight, qzeros, scales, inputs, outputs, group, data, zeros);
}

// The instructions with which this processor multiplies bfloat16 numbers, the slowest first, with commas between them. If
// there are none, the functions below do nothing.
const char* gaq_products() {
#if defined(HAS_TILES)
    if (multiplies_tiles()) return "AVX512-BF16,AMX";
#endif
#if defined(__x86_64__)
    if (multiplies_bf16()) return "AVX512-BF16";
#endif
    return "";
}

// See add_gram in products.h. tiles: with AMX.
void gaq_add_gram(const void* x, int32_t narrow, int64_t stride, int64_t tokens, int64_t columns, const float* roots,
                  float* total, float* magnitudes, int32_t tiles, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
#if defined(HAS_TILES)
    if (tiles && multiplies_tiles())
        return add_gram_in_tiles(pool_of(threads), x, narrow, stride, tokens, columns, roots, total, magnitudes);
#endif
#if defined(__x86_64__)
    if (multiplies_bf16()) add_gram(pool_of(threads), x, narrow, stride, tokens, columns, roots, total, magnitudes);
#else
    (void)x, (void)narrow, (void)stride, (void)tokens, (void)columns, (void)roots, (void)total, (void)magnitudes;
    (void)tiles, (void)threads;
#endif
}

// See add_cross in products.h. tiles: with AMX.
void gaq_add_cross(const float* left, int64_t left_stride, const float* right, int64_t right_stride, int64_t tokens,
                   int64_t columns, const float* factors, float* total, int32_t tiles, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
#if defined(HAS_TILES)
    if (tiles && multiplies_tiles())
        return add_cross_in_tiles(pool_of(threads), left, left_stride, right, right_stride, tokens, columns, factors, total);
#endif
#if defined(__x86_64__)
    if (multiplies_bf16())
        add_cross(pool_of(threads), left, left_stride, right, right_stride, tokens, columns, factors, total);
#else
    (void)left, (void)left_stride, (void)right, (void)right_stride, (void)tokens, (void)columns, (void)factors;
    (void)total, (void)tiles, (void)threads;
#endif
}

// Causal attention over bf16: see attend_causally in products.h. q, k, v: with the numbers between two rows, two heads
// and two tokens, the latter even; out: bf16 [rows, tokens, heads, size]; tiles: with AMX, if size is a multiple of 32.
void gaq_attend(const uint16_t* q, const int64_t* q_strides, const uint16_t* k, const int64_t* k_strides,
                const uint16_t* v, const int64_t* v_strides, int64_t rows, int64_t heads, int64_t groups, int64_t tokens,
                int64_t size, int64_t window, float scale, uint16_t* out, int32_t tiles, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
#if defined(__x86_64__)
    const auto at = [](const uint16_t* x, const int64_t* s) { return Heads{x, {s[0], s[1], s[2]}}; };
    const Heads queries = at(q, q_strides), keys = at(k, k_strides), values = at(v, v_strides);
#endif
#if defined(HAS_TILES)
    if (tiles && size % BAND == 0 && multiplies_tiles())
        return attend_causally<TiledAttentionSpace>(pool_of(threads), attend_rows_in_tiles, queries, keys, values, rows,
                                                    heads, groups, tokens, size, window, scale, out);
#endif
#if defined(__x86_64__)
    if (multiplies_bf16())
        attend_causally<AttentionSpace>(pool_of(threads), attend_rows, queries, keys, values, rows, heads, groups, tokens,
                                        size, window, scale, out);
#else
    (void)q, (void)q_strides, (void)k, (void)k_strides, (void)v, (void)v_strides, (void)rows, (void)heads, (void)groups;
    (void)tokens, (void)size, (void)window, (void)scale, (void)out, (void)tiles, (void)threads;
#endif
}

// See split in products.h.
void gaq_split(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t height, int64_t width, uint16_t* out,
               int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
#if defined(__x86_64__)
    if (multiplies_bf16()) split(pool_of(threads), x, stride, rows, columns, height, width, out);
#else
    (void)x, (void)stride, (void)rows, (void)columns, (void)height, (void)width, (void)out, (void)threads;
#endif
}

// Two factors of one width -> out [rows, outputs] float32: see multiply in products.h. tiles: with AMX.
void gaq_multiply(const uint16_t* left, int64_t left_parts, int64_t rows, int64_t left_height, const uint16_t* right,
                  int64_t right_parts, int64_t outputs, int64_t right_height, int64_t width, float* out, int32_t tiles,
                  int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
#if defined(__x86_64__)
    const Factor one{left, left_parts, rows, left_height, width}, other{right, right_parts, outputs, right_height, width};
#endif
#if defined(HAS_TILES)
    if (tiles && multiplies_tiles()) return multiply_in_tiles(pool_of(threads), one, other, out);
#endif
#if defined(__x86_64__)
    if (multiplies_bf16()) multiply(pool_of(threads), one, other, out);
#else
    (void)left, (void)left_parts, (void)rows, (void)left_height, (void)right, (void)right_parts, (void)outputs;
    (void)right_height, (void)width, (void)out, (void)tiles, (void)threads;
#endif
}

// See elements.h. narrow: bf16 instead of float32; out: likewise.
void gaq_norm(const void* x, int32_t narrow, int64_t rows, int64_t width, const float* gain, float eps, void* out,
              int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    norm_rows(pool_of(threads), x, narrow, rows, width, gain, eps, out);
}
void gaq_gelu(const void* x, int32_t narrow, int64_t count, void* out, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    gelu_numbers(pool_of(threads), x, narrow, count, out);
}

void gaq_rotate(const void* x, int32_t narrow, const int64_t* strides, int64_t rows, int64_t tokens, int64_t heads,
                int64_t size, const float* cos, const float* sin, int64_t apart, void* out, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    rotate_heads(pool_of(threads), x, narrow, strides, rows, tokens, heads, size, cos, sin, apart, out);
}

// See descent.h.
void gaq_add_stretch(const float* weight, int64_t row_stride, const float* scale, float share, int64_t rows,
                     int64_t groups, int64_t group, float* spread, float* stretch, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    add_stretch(pool_of(threads), weight, row_stride, scale, share, rows, groups, group, spread, stretch);
}

// See columns.h.
void gaq_round_columns(const float* target, float* work, float* q, const float* near, const float* scale,
                       const float* zero, const int64_t* group_of, int64_t columns, int64_t rows, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    round_columns(pool_of(threads), target, work, q, near, scale, zero, group_of, columns, rows);
}
void gaq_move_columns(const float* slope, float* integers, float* error, const float* near, const float* scale,
                      const float* inverse, const float* curvature, const int64_t* group_of, int64_t columns,
                      int64_t rows, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    move_columns(pool_of(threads), slope, integers, error, near, scale, inverse, curvature, group_of, columns, rows);
}

void gaq_quantize(int32_t kind, const uint16_t* weight, int64_t inputs, int64_t outputs, int64_t group, uint8_t* data,
                  uint8_t* zeros, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    if (kind == INT4) quantize_weight<INT4>(pool_of(threads), weight, inputs, outputs, group, data, zeros);
    else quantize_weight<INT8>(pool_of(threads), weight, inputs, outputs, group, data, zeros);
}
}
#pragma GCC visibility pop
