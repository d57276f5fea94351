// What each instruction tier provides for the operators that work on sequences: norms, routing, attention and
// gated delta-net. A kernel is single-threaded; the drivers (rows.cpp, attention.cpp, delta_net.cpp) cut the work.
//
// Shape letters: T tokens, Hq/Hkv query/KV heads, G = Hq / Hkv, D head dim, R rotary dims, Hk/Hv delta-net key/value
// heads, Dk/Dv their dims, C = 2 * Hk * Dk + Hv * Dv conv channels, W conv width.
//
// Functions here are always inlined: a copy emitted by one tier's file could run on a machine of a lower tier.
#pragma once
#include <cstdint>

namespace moestream {

constexpr int64_t kRowBlock = 96;    // query rows of one attention unit; a row is (token, query head of the group)
constexpr int64_t kKeyBlock = 64;    // keys scored at a time
constexpr int64_t kChunk = 32;       // tokens of one delta-net chunk
constexpr int64_t kSegment = 128;    // tokens between two barriers of the delta-net
constexpr int64_t kMaxPadding = 64;  // every tier pads rows to a divisor of this many floats
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxConvWidth = 16;

[[gnu::always_inline]] constexpr int64_t padded(int64_t n) { return (n + kMaxPadding - 1) / kMaxPadding * kMaxPadding; }

struct AttentionArgs {
    const float* q;       // [T, Hq * D * (2 if gated else 1)], rows per head [D query | D gate]
    const float* k;       // [T, Hkv * D]
    const float* v;       // [T, Hkv * D]
    const float* cos;     // [T, R / 2]
    const float* sin;     // [T, R / 2]
    const float* q_norm;  // [D]
    const float* k_norm;  // [D]
    void* cache_k;        // [Hkv, capacity, D], float or IEEE half
    void* cache_v;        // [Hkv, capacity, D]
    float* out;           // [T, Hq * D]; holds the scaled queries until a row is finished
    int64_t tokens;
    int64_t past;  // tokens in the cache before this call
    int64_t capacity;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t rotary_dim;
    float eps;
    bool gated;
    bool half;

    [[gnu::always_inline]] int64_t group() const { return heads / kv_heads; }
};

// Query rows [row0, row1) of one KV head against keys [key0, key1); row r is token r / G, head kv_head * G + r % G.
struct AttentionUnit {
    int64_t kv_head;
    int64_t row0;
    int64_t row1;
    int64_t key0;
    int64_t key1;

    [[gnu::always_inline]] int64_t rows() const { return row1 - row0; }
};

// A unit's result: unnormalised outputs [rows, D], then each row's maximum score and sum of exponentials.
[[gnu::always_inline]] constexpr int64_t partial_floats(int64_t rows, int64_t head_dim) {
    return rows * (head_dim + 2);
}

[[gnu::always_inline]] constexpr int64_t attention_scratch_floats(int64_t head_dim) {
    return (2 * kRowBlock + kKeyBlock) * padded(head_dim) + kRowBlock * kKeyBlock + kRowBlock;
}

struct DeltaNetArgs {
    const float* u;          // [T, C]
    const float* z;          // [T, Hv * Dv]
    const float* b;          // [T, Hv]
    const float* a;          // [T, Hv]
    const float* conv;       // [C, W]
    const float* neg_exp_a;  // [Hv]
    const float* dt_bias;    // [Hv]
    const float* norm;       // [Dv]
    float* state_conv;       // [W - 1, C]
    float* state_s;          // [Hv, Dk, Dv]
    float* out;              // [T, Hv * Dv]
    int64_t tokens;
    int64_t key_heads;
    int64_t value_heads;
    int64_t key_dim;
    int64_t value_dim;
    int64_t width;
    float eps;
    bool chunked;

    // The segment being worked on, and what delta_prepare leaves for delta_head.
    int64_t begin;
    int64_t count;
    float* q;     // [Hk, kSegment, Dk], l2-normalised and divided by sqrt(Dk)
    float* k;     // [Hk, kSegment, Dk], l2-normalised
    float* v;     // [Hv, kSegment, Dv]
    float* g;     // [kSegment, Hv], log decay
    float* beta;  // [kSegment, Hv]
    float* kk;    // [Hk, kSegment / kChunk, kChunk, kChunk], k k^T, lower triangle (chunked only)
    float* qk;    // same shape, q k^T

    [[gnu::always_inline]] int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

[[gnu::always_inline]] constexpr int64_t delta_scratch_floats(int64_t key_dim, int64_t value_dim, int64_t width) {
    const int64_t prepare = width * (key_dim > value_dim ? key_dim : value_dim) + padded(key_dim) * kChunk;
    const int64_t head = (key_dim + 2 * kChunk) * padded(value_dim) + 2 * kChunk * kChunk + 8 * kChunk + key_dim;
    return prepare > head ? prepare : head;
}

struct SequenceKernels {
    // y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* y);

    // ids and weights [rows, k] of the k largest logits [rows, experts], descending, ties to the lower index.
    void (*route)(const float* logits, int64_t rows, int64_t experts, int64_t k, bool renormalise, int32_t* ids,
                  float* weights);

    // out = x + sum_j weights[j] * expert_out[j] + sigmoid(*gate) * shared for one row; shared and gate may be null.
    void (*combine)(const float* x, const float* expert_out, const float* weights, const float* shared,
                    const float* gate, int64_t k, int64_t width, float* out);

    // Norm, rotary and scale of tokens [t0, t1): queries to args.out, keys and values to the cache.
    void (*attention_prepare)(const AttentionArgs& args, int64_t t0, int64_t t1);
    void (*attention_partial)(const AttentionArgs& args, const AttentionUnit& unit, float* scratch, float* partial);
    // Joins the partials of consecutive key ranges (in that order) and writes rows of args.out.
    void (*attention_finish)(const AttentionArgs& args, const AttentionUnit& unit, const float* partials,
                             int64_t splits);

    // Units: Hk key heads (conv, silu, l2 norms, products), Hv value heads (conv, silu), then the gates.
    void (*delta_prepare)(const DeltaNetArgs& args, int64_t unit, float* scratch);
    void (*delta_head)(const DeltaNetArgs& args, int64_t head, float* scratch);
};

extern const SequenceKernels kSequenceAvx512;
extern const SequenceKernels kSequenceAvx512Bf16;
extern const SequenceKernels kSequenceAvx2;
extern const SequenceKernels kSequenceNeon;
extern const SequenceKernels kSequencePortable;

// The table of active_isa().
const SequenceKernels& sequence_kernels();

}  // namespace moestream
