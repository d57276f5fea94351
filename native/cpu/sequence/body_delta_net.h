// Gated delta-net (arXiv 2412.06464): token by token for few tokens, else in chunks whose inner dependency is a
// triangular system (the UT transform of arXiv 2406.06484, solved instead of inverted). See body.h for how this file
// is used.
#pragma once
#include "cpu/sequence/body_rows.h"
#include "cpu/sequence/tile.h"

namespace moestream {
namespace {

// Rows of u and z lie pages apart, which the hardware does not foresee: ask for them this many rows early, and only
// into L2, for in L1 they would compete for the same few lines.
constexpr int64_t kFetchedRows = 12;

// y[t] = silu(conv(u)[t]) for channels [channel, channel + n) of the segment; rows of y are n apart. Also moves the
// conv state on after the last segment. `taps` holds [W, n].
template <int Width>
void convolve(const DeltaNetArgs& args, int64_t channel, int64_t n, float* taps, float* y) {
    const int64_t width = Width > 0 ? Width : args.width, history = width - 1, stride = args.channels();
    for (int64_t c = 0; c < n; ++c)
        for (int64_t j = 0; j < width; ++j) taps[j * n + c] = args.conv[(channel + c) * width + j];
    auto input = [&](int64_t t) {  // t may reach back into the state
        return (t < 0 ? args.state_conv + (t + history) * stride : args.u + t * stride) + channel;
    };
    for (int64_t t = 0; t < args.count; ++t) {
        const float* x[kMaxConvWidth];
        for (int64_t j = 0; j < width; ++j) x[j] = input(args.begin + t - history + j);
        const float* later = input(least(args.begin + t + kFetchedRows, args.tokens - 1));
        for (int64_t c = 0; c < n; c += kLanes) {
            if (c % 16 == 0) __builtin_prefetch(later + c, 0, 2);
            Vec acc = zero();
            for (int64_t j = 0; j < width; ++j) acc = fma(load_row(x[j], c, n), load_row(taps + j * n, c, n), acc);
            store_row(y + t * n, c, n, silu(acc));
        }
    }
    if (args.begin + args.count < args.tokens) return;
    for (int64_t j = 0; j < history; ++j)  // in this order a row is read before it is overwritten
        std::memcpy(args.state_conv + j * stride + channel, input(args.tokens - history + j), n * sizeof(float));
}

void convolve_any(const DeltaNetArgs& args, int64_t channel, int64_t n, float* taps, float* y) {
    args.width == 4 ? convolve<4>(args, channel, n, taps, y) : convolve<0>(args, channel, n, taps, y);
}

void l2_normalise(float* rows, int64_t count, int64_t n, float scale) {
    for (int64_t t = 0; t < count; ++t, rows += n) {
        const Vec inverse = broadcast(scale / __builtin_sqrtf(dot(rows, rows, n) + 1e-6f));
        for (int64_t i = 0; i < n; i += kLanes) store_row(rows, i, n, load_row(rows, i, n) * inverse);
    }
}

void prepare_key_head(const DeltaNetArgs& args, int64_t head, float* scratch) {
    const int64_t dim = args.key_dim;
    float *q = args.q + head * kSegment * dim, *k = args.k + head * kSegment * dim;
    convolve_any(args, head * dim, dim, scratch, q);
    convolve_any(args, (args.key_heads + head) * dim, dim, scratch, k);
    l2_normalise(q, args.count, dim, 1.0f / __builtin_sqrtf(static_cast<float>(dim)));
    l2_normalise(k, args.count, dim, 1.0f);
    if (!args.chunked) return;
    float* transposed = scratch + args.width * dim;  // panels [kChunk / kStrip][Dk][kStrip]
    for (int64_t first = 0; first < args.count; first += kChunk) {
        const int64_t count = least(kChunk, args.count - first);
        const int64_t at = (head * kSegment + first) * kChunk;
        pack_transposed(k + first * dim, count, dim, dim, transposed);
        for (int64_t c = 0; c < count; c += kStrip) {  // rows above the diagonal's strip are never read
            const int64_t rows = count - c, to = at + c * kChunk + c;
            multiply(rows, dim, {k + (first + c) * dim, dim, 1}, transposed + c * dim, args.kk + to, kChunk, nullptr);
            multiply(rows, dim, {q + (first + c) * dim, dim, 1}, transposed + c * dim, args.qk + to, kChunk, nullptr);
        }
    }
}

// Decays below e^-1000 are 0 in float32 all the same, and the bound keeps their sums exact enough.
void prepare_gates(const DeltaNetArgs& args) {
    const int64_t heads = args.value_heads;
    const Vec lowest = broadcast(-1000.0f);
    for (int64_t t = 0; t < args.count; ++t) {
        const float *a = args.a + (args.begin + t) * heads, *b = args.b + (args.begin + t) * heads;
        for (int64_t h = 0; h < heads; h += kLanes) {
            const Vec step = softplus(load_row(a, h, heads) + load_row(args.dt_bias, h, heads));
            const Vec g = load_row(args.neg_exp_a, h, heads) * step;
            store_row(args.g + t * heads, h, heads, g < lowest ? lowest : g);
            store_row(args.beta + t * heads, h, heads, sigmoid(load_row(b, h, heads)));
        }
    }
}

void delta_prepare(const DeltaNetArgs& args, int64_t unit, float* scratch) {
    const int64_t head = unit - args.key_heads;
    if (head < 0) return prepare_key_head(args, unit, scratch);
    if (head == args.value_heads) return prepare_gates(args);
    convolve_any(args, 2 * args.key_heads * args.key_dim + head * args.value_dim, args.value_dim, scratch,
                 args.v + head * kSegment * args.value_dim);
}

// out = o / rms(o) * norm * silu(z) for token t of the segment.
inline void finish_token(const DeltaNetArgs& args, int64_t head, int64_t t, const float* o) {
    const int64_t dim = args.value_dim, at = ((args.begin + t) * args.value_heads + head) * dim;
    const int64_t later = least(kFetchedRows, args.tokens - 1 - args.begin - t) * args.value_heads * dim;
    const Vec inverse = broadcast(inverse_rms(o, dim, args.eps));
    for (int64_t i = 0; i < dim; i += kLanes) {
        if (i % 16 == 0) __builtin_prefetch(args.z + at + later + i, 0, 2);
        const Vec y = load_row(o, i, dim) * inverse * load_row(args.norm, i, dim);
        store_row(args.out + at, i, dim, y * silu(load_row(args.z + at, i, dim)));
    }
}

// One token on columns [j, j + Cols * kLanes) of S [Dk, Dv]. The new state is never read back for the output:
// S'^T q = decay S^T q + (k . q) d, so memory sees one read and one write of S.
template <int Cols, bool Whole>
inline void update_columns(int64_t rows, int64_t width, int64_t j, const float* q, const float* k, const float* v,
                           float decay, float beta, float kq, float* s, float* o) {
    auto read = [&](const float* row, int n) {
        return Whole ? load(row + j + n * kLanes) : load_part(row + j, width - j);
    };
    Vec sk[Cols], sq[Cols];
    for (int n = 0; n < Cols; ++n) sk[n] = sq[n] = zero();
    for (int64_t i = 0; i < rows; ++i) {
        const Vec x = broadcast(k[i]), y = broadcast(q[i]);
        for (int n = 0; n < Cols; ++n) {
            const Vec state = read(s + i * width, n);
            sk[n] = fma(x, state, sk[n]);
            sq[n] = fma(y, state, sq[n]);
        }
    }
    const Vec scale = broadcast(decay);
    Vec delta[Cols];
    for (int n = 0; n < Cols; ++n) {
        delta[n] = (read(v, n) - scale * sk[n]) * broadcast(beta);
        store_row(o, j + n * kLanes, width, fma(broadcast(kq), delta[n], scale * sq[n]));
    }
    for (int64_t i = 0; i < rows; ++i) {
        const Vec x = broadcast(k[i]);
        for (int n = 0; n < Cols; ++n)
            store_row(s + i * width, j + n * kLanes, width, fma(x, delta[n], scale * read(s + i * width, n)));
    }
}

void head_by_token(const DeltaNetArgs& args, int64_t head, float* o) {
    const int64_t dk = args.key_dim, dv = args.value_dim;
    const int64_t key_head = head / (args.value_heads / args.key_heads);
    float* s = args.state_s + head * dk * dv;
    for (int64_t t = 0; t < args.count; ++t) {
        const float* q = args.q + (key_head * kSegment + t) * dk;
        const float* k = args.k + (key_head * kSegment + t) * dk;
        const float* v = args.v + (head * kSegment + t) * dv;
        const float decay = exponential(broadcast(args.g[t * args.value_heads + head]))[0];
        const float beta = args.beta[t * args.value_heads + head], kq = dot(k, q, dk);
        int64_t j = 0;
        for (; j + kStateCols * kLanes <= dv; j += kStateCols * kLanes)
            update_columns<kStateCols, true>(dk, dv, j, q, k, v, decay, beta, kq, s, o);
        for (; j + kLanes <= dv; j += kLanes) update_columns<1, true>(dk, dv, j, q, k, v, decay, beta, kq, s, o);
        if (j < dv) update_columns<1, false>(dk, dv, j, q, k, v, decay, beta, kq, s, o);
        finish_token(args, head, t, o);
    }
}

// Scratch of one value head in the chunked form, carved from one block.
struct ChunkScratch {
    float* state;    // S as panels [Dv / kStrip][Dk][kStrip]
    float* delta;    // one strip [kChunk, kStrip]
    float* out;      // [kChunk, padded Dv]
    float* within;   // [kChunk, kChunk]: -beta_i exp(G_i - G_j) k_i k_j below the diagonal
    float* attend;   // [kChunk, kChunk]: exp(G_i - G_j) q_i k_j, diagonal included
    float* high;     // [kChunk]: running sum G of log decays, and what its rounding left
    float* low;      // [kChunk]
    float* beta;     // [kChunk]
    float* decay;    // [kChunk]: exp(G_i)
    float* remains;  // [kChunk]: exp(G_last - G_i)
    float* carry;    // [Dk]: exp(G_last) throughout

    ChunkScratch(const DeltaNetArgs& args, float* block) {
        auto take = [&](int64_t n) {
            float* at = block;
            block += n;
            return at;
        };
        const int64_t wide = padded(args.value_dim);
        state = take(args.key_dim * wide);
        delta = take(kChunk * wide);
        out = take(kChunk * wide);
        within = take(kChunk * kChunk);
        attend = take(kChunk * kChunk);
        high = take(kChunk);
        low = take(kChunk);
        beta = take(kChunk);
        decay = take(kChunk);
        remains = take(kChunk);
        carry = take(args.key_dim);
    }
};

// The decays of a chunk. Sums are kept as pairs of floats: after strong decays a plain float sum would round away
// the weak ones that follow.
void chunk_decays(const DeltaNetArgs& args, int64_t head, int64_t first, int64_t count, ChunkScratch& c) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * args.value_heads + head;
        total += args.g[at];
        c.high[i] = static_cast<float>(total);
        c.low[i] = static_cast<float>(total - c.high[i]);
        c.beta[i] = args.beta[at];
    }
    for (int64_t i = count; i < kChunk; ++i) c.high[i] = c.low[i] = 0;
    const Vec last_high = broadcast(c.high[count - 1]), last_low = broadcast(c.low[count - 1]);
    for (int64_t i = 0; i < kChunk; i += kLanes) {
        const Vec high = load(c.high + i), low = load(c.low + i);
        store(c.decay + i, exponential(high + low));
        store(c.remains + i, exponential((last_high - high) + (last_low - low)));
    }
    const float carry = c.decay[count - 1];
    for (int64_t i = 0; i < args.key_dim; ++i) c.carry[i] = carry;
}

void chunk_matrices(const float* kk, const float* qk, int64_t count, ChunkScratch& c) {
    for (int64_t i = 0; i < count; ++i) {
        float *within = c.within + i * kChunk, *attend = c.attend + i * kChunk;
        const Vec high = broadcast(c.high[i]), low = broadcast(c.low[i]), beta = broadcast(-c.beta[i]);
        for (int64_t j = 0; j <= i; j += kLanes) {
            const Vec ratio = exponential((high - load(c.high + j)) + (low - load(c.low + j)));
            store(within + j, load(kk + i * kChunk + j) * ratio * beta);
            store(attend + j, load(qk + i * kChunk + j) * ratio);
        }
        const int64_t end = least(i / kTileRows * kTileRows + kTileRows, kChunk);  // what a tile may read of the row
        for (int64_t j = i + 1; j < end; ++j) attend[j] = 0;
    }
}

// One strip of columns of one chunk: the system for the deltas d, the outputs, and the new state.
//   d_i = beta_i (v_i - exp(G_i) S^T k_i - sum_{j<i} exp(G_i - G_j) (k_i k_j) d_j)
//   o_i = exp(G_i) S^T q_i + sum_{j<=i} exp(G_i - G_j) (q_i k_j) d_j
//   S  <- exp(G_last) S + sum_i exp(G_last - G_i) k_i d_i^T
void chunk_strip(const DeltaNetArgs& args, const float* q, const float* k, const float* v, int64_t count, int64_t from,
                 ChunkScratch& c) {
    const int64_t dk = args.key_dim, dv = args.value_dim, wide = padded(dv);
    float *state = c.state + from * dk, *out = c.out + from;
    multiply(count, dk, {k, dk, 1}, state, c.delta, kStrip, nullptr);
    multiply(count, dk, {q, dk, 1}, state, out, wide, nullptr);
    for (int64_t i = 0; i < count; ++i) {
        const Vec decay = broadcast(c.decay[i]), beta = broadcast(c.beta[i]);
        for (int64_t j = 0; j < kStrip; j += kLanes) {
            const Vec value = from + j < dv ? load_row(v + i * dv, from + j, dv) : zero();
            float* delta = c.delta + i * kStrip + j;
            store(delta, (value - decay * load(delta)) * beta);
        }
    }
    solve(count, {c.within, kChunk, 1}, c.delta);
    multiply_lower(count, {c.attend, kChunk, 1}, c.delta, out, wide, c.decay);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < kStrip; j += kLanes) {
            float* delta = c.delta + i * kStrip + j;
            store(delta, load(delta) * broadcast(c.remains[i]));
        }
    multiply(dk, count, {k, 1, dk}, c.delta, state, kStrip, c.carry);
}

void head_by_chunk(const DeltaNetArgs& args, int64_t head, float* scratch) {
    const int64_t dk = args.key_dim, dv = args.value_dim;
    const int64_t key_head = head / (args.value_heads / args.key_heads);
    float* s = args.state_s + head * dk * dv;
    ChunkScratch c(args, scratch);
    pack(s, dk, dv, dv, c.state);
    for (int64_t first = 0; first < args.count; first += kChunk) {
        const int64_t count = least(kChunk, args.count - first), at = key_head * kSegment + first;
        chunk_decays(args, head, first, count, c);
        chunk_matrices(args.kk + at * kChunk, args.qk + at * kChunk, count, c);
        for (int64_t from = 0; from < dv; from += kStrip)
            chunk_strip(args, args.q + at * dk, args.k + at * dk, args.v + (head * kSegment + first) * dv, count, from,
                        c);
        for (int64_t i = 0; i < count; ++i) finish_token(args, head, first + i, c.out + i * padded(dv));
    }
    for (int64_t i = 0; i < dk; ++i)
        for (int64_t from = 0; from < dv; from += kStrip)
            std::memcpy(s + i * dv + from, c.state + from * dk + i * kStrip, least(kStrip, dv - from) * sizeof(float));
}

void delta_head(const DeltaNetArgs& args, int64_t head, float* scratch) {
    args.chunked ? head_by_chunk(args, head, scratch) : head_by_token(args, head, scratch);
}

}  // namespace
}  // namespace moestream
