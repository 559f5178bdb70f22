// The forward of a language model over a flat batch of tokens, in one call. Arithmetic between the linears is float32;
// keys and values are kept in bf16. models/forward/torch_decoder.py is the same forward in torch, and its oracle.

#include "attention.h"
#include "pack.h"
#include "refine.h"
#include "specs.h"

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

// Kept from call to call and only ever grown, so that a token allocates nothing.
struct Buffers {
    std::vector<float> x, normed, mixed, qkv, attended, gate_up, act, scale, total, cosine, sine;
    std::vector<int8_t> q;
    std::vector<uint16_t> k, v;
    std::vector<int64_t> position_of;
    std::vector<std::vector<float>> scores;  // one per thread
};
static Buffers the_buffers;
template <class T> static void at_least(std::vector<T>& v, int64_t size) {
    if ((int64_t)v.size() < size) v.resize(size);
}

static void rms_norm(const float* x, const float* gain, int64_t n, float eps, float* out) {
    Floats squares = splat(0.0f);
    const int64_t whole = n & ~(LANES - 1);
    for (int64_t i = 0; i < whole; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (int64_t i = whole; i < n; i++) total += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(total / (float)n + eps);
    for (int64_t i = 0; i < whole; i += LANES) store(out + i, load(x + i) * factor * load(gain + i));
    for (int64_t i = whole; i < n; i++) out[i] = x[i] * factor * gain[i];
}

static void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

// The rotary embedding in place. cosine, sine: of the angles, [D / 2].
static void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

// The largest sizes that any layer has: the buffers fit all layers.
struct Widths {
    int64_t half_head = 0, query = 0, kv = 0, qkv = 0, intermediate = 0;
    explicit Widths(const ModelSpec& model) {
        for (int64_t i = 0; i < model.layers; i++) {
            const LayerSpec& l = model.layer[i];
            half_head = std::max(half_head, l.head_dim / 2);
            query = std::max(query, l.heads * l.head_dim);
            kv = std::max(kv, l.kv_heads * l.head_dim);
            qkv = std::max(qkv, (l.heads + 2 * l.kv_heads) * l.head_dim);
            intermediate = std::max(intermediate, l.intermediate);
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
        at_least(b.k, tokens * most.kv);
        at_least(b.v, tokens * most.kv);
        at_least(b.cosine, tokens * most.half_head);
        at_least(b.sine, tokens * most.half_head);
    }

    // logits: [sum of wanted, V], those after the last wanted[chunk] tokens of each chunk, in that order.
    void run(const int64_t* wanted, float* logits) {
        at_least(b.position_of, tokens);
        for (int64_t p = 0; p < nchunks; p++)
            for (int64_t i = 0; i < chunks[p].count; i++) b.position_of[chunks[p].offset + i] = chunks[p].start + i;
        embed();
        for (int64_t l = 0; l < m.layers; l++) layer(m.layer[l], l);
        head(wanted, logits);
    }

  private:
    // Calls body(t) for each token: on this thread for one token, on all threads for more.
    template <class Body> void each_token(const Body& body) {
        if (tokens == 1) return body(0);
        const int64_t step = std::max<int64_t>(1, tokens / (4 * pool.threads()));
        pool.run((tokens + step - 1) / step, [&](int64_t item, int) {
            for (int64_t t = item * step; t < std::min(tokens, (item + 1) * step); t++) body(t);
        });
    }

    void embed() {
        for (int64_t t = 0; t < tokens; t++) {
            const uint16_t* from = m.embedding + (int64_t)ids[t] * m.hidden;
            for (int64_t i = 0; i < m.hidden; i++)
                b.x[t * m.hidden + i] = float_of(from[i]) * m.embed_scale;
        }
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
        const int64_t h = m.hidden, d = l.head_dim, wide = l.intermediate;
        const int64_t q_size = l.heads * d, kv_size = l.kv_heads * d, qkv_size = q_size + 2 * kv_size;
        const Activations in = activations(b.normed.data(), tokens, h);
        each_token([&](int64_t t) {
            rms_norm(&b.x[t * h], l.input_norm, h, m.eps, &b.normed[t * h]);
            if (l.qkv.kind != BF16) quantize_row(in, t, l.qkv.group);
        });
        apply(pool, l.qkv, in, b.qkv.data(), qkv_size);
        each_token([&](int64_t t) {
            float* row = &b.qkv[t * qkv_size];
            const float* cosine = &b.cosine[t * (d / 2)];
            const float* sine = &b.sine[t * (d / 2)];
            for (int64_t n = 0; n < l.heads + l.kv_heads; n++) {
                float* x = row + n * d;
                const bool query = n < l.heads;
                if (l.q_norm) rms_norm(x, query ? l.q_norm : l.k_norm, d, m.eps, x);
                rotate(x, cosine, sine, d / 2);
                if (query)
                    for (int64_t i = 0; i < d; i++) x[i] *= l.query_scale;
            }
            for (int64_t i = 0; i < kv_size; i += LANES) {
                store_bf16(&b.k[t * kv_size + i], load(row + q_size + i));
                store_bf16(&b.v[t * kv_size + i], load(row + q_size + kv_size + i));
            }
        });
        attend(l, index);
        const Activations attended = activations(b.attended.data(), tokens, q_size);
        if (l.o.kind != BF16) each_token([&](int64_t t) { quantize_row(attended, t, l.o.group); });
        apply(pool, l.o, attended, b.mixed.data(), h);
        each_token([&](int64_t t) {
            float* mixed = &b.mixed[t * h];
            if (l.attention_norm) rms_norm(mixed, l.attention_norm, h, m.eps, mixed);
            add(&b.x[t * h], mixed, h);
            rms_norm(&b.x[t * h], l.mlp_norm, h, m.eps, &b.normed[t * h]);
            if (l.gate_up.kind != BF16) quantize_row(in, t, l.gate_up.group);
        });
        apply(pool, l.gate_up, in, b.gate_up.data(), 2 * wide);
        const Activations act = activations(b.act.data(), tokens, wide);
        each_token([&](int64_t t) {
            const float* gate = &b.gate_up[t * 2 * wide];
            float* out = &b.act[t * wide];
            for (int64_t i = 0; i < wide; i += LANES)
                store(out + i, gelu_tanh(load(gate + i)) * load(gate + wide + i));
            if (l.down.kind != BF16) quantize_row(act, t, l.down.group);
        });
        apply(pool, l.down, act, b.mixed.data(), h);
        each_token([&](int64_t t) {
            float* mixed = &b.mixed[t * h];
            if (l.post_mlp_norm) rms_norm(mixed, l.post_mlp_norm, h, m.eps, mixed);
            add(&b.x[t * h], mixed, h);
        });
    }

    // Queries of one kv head, of consecutive tokens of a chunk.
    struct Tile {
        int64_t chunk, first, count, head, heads;  // tokens first .. of the chunk; query heads head ..
    };

    void attend(const LayerSpec& l, int64_t index) {
        const int64_t shared = l.heads / l.kv_heads;
        const bool few = tokens * l.kv_heads < 2 * pool.threads();
        const int64_t heads = std::min<int64_t>(few ? 1 : shared, MAX_QUERIES);
        std::vector<Tile> tiles;
        int64_t most_keys = 0;
        for (int64_t p = 0; p < nchunks; p++) {
            const int64_t step = MAX_QUERIES / heads;
            for (int64_t first = 0; first < chunks[p].count; first += step)
                for (int64_t kv = 0; kv < l.kv_heads; kv++)
                    for (int64_t h = 0; h < shared; h += heads)
                        tiles.push_back({p, first, std::min(step, chunks[p].count - first), kv * shared + h,
                                         std::min(heads, shared - h)});
            most_keys = std::max(most_keys, chunks[p].start + chunks[p].count);
        }
        at_least(b.scores, pool.threads());
        for (auto& s : b.scores) at_least(s, MAX_QUERIES * most_keys);
        pool.run((int64_t)tiles.size(), [&](int64_t i, int thread) { tile(tiles[i], l, index, b.scores[thread].data()); });
        // Only now: the first tokens of this batch may have seen what the ring overwrites.
        const int64_t slots = cache.slots[index], d = l.head_dim;
        for (int64_t p = 0; p < nchunks; p++)
            for (int64_t i = std::max<int64_t>(0, chunks[p].count - slots); i < chunks[p].count; i++)
                for (int64_t kv = 0; kv < l.kv_heads; kv++) {
                    const int64_t to = ((chunks[p].row * l.kv_heads + kv) * slots + (chunks[p].start + i) % slots) * d;
                    const int64_t from = ((chunks[p].offset + i) * l.kv_heads + kv) * d;
                    memcpy(cache.keys[index] + to, &b.k[from], 2 * d);
                    memcpy(cache.values[index] + to, &b.v[from], 2 * d);
                }
    }

    void tile(const Tile& t, const LayerSpec& l, int64_t index, float* scores) {
        const ChunkSpec& chunk = chunks[t.chunk];
        const int64_t d = l.head_dim, slots = cache.slots[index], kv = t.head / (l.heads / l.kv_heads);
        const int64_t qkv_size = (l.heads + 2 * l.kv_heads) * d;
        const int64_t window = l.window ? l.window : INT64_MAX;
        const int64_t first = chunk.start + t.first;  // the first query's position
        const int64_t low = std::max<int64_t>(0, first - std::min(first, window - 1));  // the oldest key seen by any
        Run runs[3];
        int nruns = 0;
        const int64_t base = (chunk.row * l.kv_heads + kv) * slots * d;
        for (int64_t p = low; p < chunk.start;) {
            const int64_t count = std::min(chunk.start - p, slots - p % slots);
            const int64_t at = base + p % slots * d;
            runs[nruns++] = {cache.keys[index] + at, cache.values[index] + at, d, count};
            p += count;
        }
        const int64_t from = std::max(low - chunk.start, (int64_t)0), fresh = t.first + t.count - from;
        const int64_t at = ((chunk.offset + from) * l.kv_heads + kv) * d;
        runs[nruns++] = {&b.k[at], &b.v[at], l.kv_heads * d, fresh};
        const int64_t keys = std::max<int64_t>(0, chunk.start - low) + fresh;
        const int64_t queries = t.count * t.heads;
        float q[MAX_QUERIES * MAX_HEAD_DIM];
        float* out[MAX_QUERIES];
        for (int64_t i = 0; i < queries; i++) {
            const int64_t token = chunk.offset + t.first + i / t.heads, head = t.head + i % t.heads;
            memcpy(q + i * d, &b.qkv[token * qkv_size + head * d], 4 * d);
            out[i] = &b.attended[(token * l.heads + head) * d];
        }
        // a full tile, or four, two and one queries at a time
        for (int64_t i = 0; i < queries;) {
            const int64_t left = queries - i;
            const int many = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            if (many == 8) score<8>(q, d, runs, nruns, scores, keys);
            else if (many == 4) score<4>(q + i * d, d, runs, nruns, scores, keys);
            else if (many == 2) score<2>(q + i * d, d, runs, nruns, scores, keys);
            else score<1>(q + i * d, d, runs, nruns, scores, keys);
            for (int n = 0; n < many; n++) {
                const int64_t position = first + (i + n) / t.heads;
                softmax(scores + n * keys, keys, std::max<int64_t>(0, position - std::min(position, window - 1) - low),
                        position + 1 - low, m.attention_softcap);
            }
            if (many == 8) mix<8>(scores, keys, runs, nruns, d, out);
            else if (many == 4) mix<4>(scores, keys, runs, nruns, d, out + i);
            else if (many == 2) mix<2>(scores, keys, runs, nruns, d, out + i);
            else mix<1>(scores, keys, runs, nruns, d, out + i);
            i += many;
        }
    }

    void head(const int64_t* wanted, float* logits) {
        int64_t rows = 0;
        for (int64_t p = 0; p < nchunks; p++)
            for (int64_t i = chunks[p].count - wanted[p]; i < chunks[p].count; i++) {
                const float* last = &b.x[(chunks[p].offset + i) * m.hidden];
                rms_norm(last, m.norm, m.hidden, m.eps, &b.normed[rows++ * m.hidden]);
            }
        if (!rows) return;
        const Activations in = activations(b.normed.data(), rows, m.hidden);
        if (m.head.kind != BF16)
            for (int64_t r = 0; r < rows; r++) quantize_row(in, r, m.head.group);
        apply(pool, m.head, in, logits, m.head.outputs);
        if (m.final_softcap > 0) {
            const int64_t all = rows * m.head.outputs, step = 16384;
            pool.run((all + step - 1) / step, [&](int64_t item, int) {
                for (int64_t i = item * step; i < std::min(all, (item + 1) * step); i++)
                    logits[i] = soft_cap(logits[i], m.final_softcap);
            });
        }
        if (m.exact)
            for (int64_t r = 0; r < rows; r++)
                refine(pool, m.exact, m.hidden, m.head.outputs, m.final_softcap, &b.normed[r * m.hidden],
                       logits + r * m.head.outputs);
    }

    const ModelSpec& m;
    Buffers& b;
    Pool& pool;
    const CacheSpec& cache;
    const ChunkSpec* chunks;
    const int64_t nchunks;
    const int32_t* ids;
    const int64_t tokens;
    const float* tabled = nullptr;  // the inv_freq whose angles are in the buffers
};

extern "C" {

// The instruction set that the arithmetic was compiled for.
const char* gaq_instructions() {
#if defined(__AVX512VNNI__)
    return "AVX-512 VNNI";
#elif defined(__AVXVNNI__)
    return "AVX-VNNI";
#elif defined(__AVX2__)
    return "AVX2";
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
        for (int64_t r = 0; r < rows; r++) quantize_row(a, r, linear->group);
    apply(pool_of(threads), *linear, a, out, linear->outputs);
}

void gaq_pack_awq(const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales, int64_t inputs, int64_t outputs,
                  int64_t group, uint8_t* data, uint8_t* zeros, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    pack_awq(pool_of(threads), qweight, qzeros, scales, inputs, outputs, group, data, zeros);
}

void gaq_quantize(int32_t kind, const uint16_t* weight, int64_t inputs, int64_t outputs, int64_t group, uint8_t* data,
                  uint8_t* zeros, int32_t threads) {
    std::lock_guard<std::mutex> lock(one_call);
    if (kind == INT4) quantize_weight<INT4>(pool_of(threads), weight, inputs, outputs, group, data, zeros);
    else quantize_weight<INT8>(pool_of(threads), weight, inputs, outputs, group, data, zeros);
}
}
