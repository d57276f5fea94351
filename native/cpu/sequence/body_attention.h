// Causal grouped-query attention with an online softmax (Milakov and Gimelshein, arXiv 1805.02867), blocked over query
// rows and keys as in FlashAttention (arXiv 2205.14135). See body.h for how this file is used.
#pragma once
#include "cpu/sequence/body_rows.h"
#include "cpu/sequence/tile.h"

namespace moestream {
namespace {

// Up to this many rows the keys are read as they lie; above, they are packed once per row block.
constexpr int64_t kFewRows = 16;

// y = rotary(x / rms(x) * weight) * scale for one head.
inline void normalise_head(const AttentionArgs& args, const float* x, const float* weight, const float* cos,
                           const float* sin, float scale, float* y) {
    const int64_t dim = args.head_dim, half = args.rotary_dim / 2;
    const float inverse = inverse_rms(x, dim, args.eps) * scale;
    for (int64_t i = 0; i < dim; i += kLanes)
        store_row(y, i, dim, load_row(x, i, dim) * broadcast(inverse) * load_row(weight, i, dim));
    for (int64_t j = 0; j < half; ++j) {
        const float a = y[j], b = y[j + half];
        y[j] = a * cos[j] - b * sin[j];
        y[j + half] = b * cos[j] + a * sin[j];
    }
}

template <class T>
inline void store_head(const float* x, int64_t dim, T* row) {
    for (int64_t i = 0; i < dim; i += kLanes) store_row(row, i, dim, load_row(x, i, dim));
}

template <class T>
void prepare_tokens(const AttentionArgs& args, int64_t t0, int64_t t1) {
    const int64_t dim = args.head_dim, half = args.rotary_dim / 2, stride = args.gated ? 2 * dim : dim;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
    for (int64_t t = t0; t < t1; ++t) {
        const float *cos = args.cos + t * half, *sin = args.sin + t * half;
        for (int64_t h = 0; h < args.heads; ++h)
            normalise_head(args, args.q + (t * args.heads + h) * stride, args.q_norm, cos, sin, scale,
                           args.out + (t * args.heads + h) * dim);
        for (int64_t h = 0; h < args.kv_heads; ++h) {
            const int64_t from = (t * args.kv_heads + h) * dim, to = (h * args.capacity + args.past + t) * dim;
            float key[kMaxHeadDim];
            normalise_head(args, args.k + from, args.k_norm, cos, sin, 1.0f, key);
            store_head(key, dim, static_cast<T*>(args.cache_k) + to);
            store_head(args.v + from, dim, static_cast<T*>(args.cache_v) + to);
        }
    }
}

void attention_prepare(const AttentionArgs& args, int64_t t0, int64_t t1) {
    args.half ? prepare_tokens<Half>(args, t0, t1) : prepare_tokens<float>(args, t0, t1);
}

inline float* row_of(const AttentionArgs& args, int64_t kv_head, int64_t row) {
    const int64_t group = args.group();
    return args.out + (row / group * args.heads + kv_head * group + row % group) * args.head_dim;
}

// Asks for the memory that is needed next, a little at each step of the work before it: values are read in columns,
// which the hardware does not foresee.
struct Ahead {
    const char* next;
    const char* end;
    int64_t lines;  // per step

    template <class T>
    Ahead(const T* memory, int64_t count, int64_t steps)
        : next(reinterpret_cast<const char*>(memory)),
          end(reinterpret_cast<const char*>(memory + count)),
          lines((end - next) / (64 * steps) + 1) {}

    void step() {
        for (int64_t i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// Scores of Rows queries against `count` keys: dot products of whole rows, kDots at a time.
template <int Rows, class T>
inline void score_rows(const float* q, int64_t ldq, const T* keys, int64_t count, int64_t dim, float* scores,
                       Ahead& ahead) {
    constexpr int Keys = kDots / Rows;
    for (int64_t l = 0; l < count; l += Keys) {
        ahead.step();
        const T* key[Keys];
        for (int j = 0; j < Keys; ++j) key[j] = keys + least(l + j, count - 1) * dim;  // past the end: the last again
        Vec acc[kDots];
        for (int i = 0; i < kDots; ++i) acc[i] = zero();
        int64_t d = 0;
        auto step = [&](auto read) {
            Vec k[Keys];
            for (int j = 0; j < Keys; ++j) k[j] = read(key[j]);
            for (int m = 0; m < Rows; ++m) {
                const Vec x = load(q + m * ldq + d);
                for (int j = 0; j < Keys; ++j) acc[m * Keys + j] = fma(x, k[j], acc[m * Keys + j]);
            }
        };
        for (; d + kLanes <= dim; d += kLanes) step([&](const T* row) { return load(row + d); });
        if (d < dim) step([&](const T* row) { return load_part(row + d, dim - d); });
        float dots[kDots];
        for (int i = 0; i < kDots; i += kLanes) store(dots + i, sums(acc + i));
        for (int m = 0; m < Rows; ++m) std::memcpy(scores + m * kKeyBlock + l, dots + m * Keys, Keys * sizeof(float));
    }
}

template <int Rows, class T>
inline void score_all(int64_t rows, const float* q, int64_t ldq, const T* keys, int64_t count, int64_t dim,
                      float* scores, Ahead& ahead) {
    for (; rows >= Rows; rows -= Rows, q += Rows * ldq, scores += Rows * kKeyBlock)
        score_rows<Rows>(q, ldq, keys, count, dim, scores, ahead);
    if constexpr (Rows > 1) score_all<Rows / 2>(rows, q, ldq, keys, count, dim, scores, ahead);
}

// O [Rows, Cols * kLanes] = diag(alpha) O + P V for a block of keys read in place; the last columns of a row whose
// width is no multiple of the vector are read with Whole = false.
template <int Rows, int Cols, bool Whole, class T>
inline void weigh_tile(const float* p, const T* values, int64_t count, int64_t dim, int64_t width, float* out,
                       int64_t ldo, const float* alpha) {
    Vec acc[Rows][Cols];
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Cols; ++n) acc[m][n] = load(out + m * ldo + n * kLanes) * broadcast(alpha[m]);
    for (int64_t l = 0; l < count; ++l) {
        Vec v[Cols];
        for (int n = 0; n < Cols; ++n)
            v[n] = Whole ? load(values + l * dim + n * kLanes) : load_part(values + l * dim, width);
        for (int m = 0; m < Rows; ++m) {
            const Vec x = broadcast(p[m * kKeyBlock + l]);
            for (int n = 0; n < Cols; ++n) acc[m][n] = fma(x, v[n], acc[m][n]);
        }
    }
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Cols; ++n) store(out + m * ldo + n * kLanes, acc[m][n]);
}

template <int Rows, int Cols, class T>
inline void weigh_rows(const float* p, const T* values, int64_t count, int64_t dim, int64_t d, float* out, int64_t ldo,
                       const float* alpha, Ahead& ahead) {
    for (; d + Cols * kLanes <= dim; d += Cols * kLanes) {
        ahead.step();
        weigh_tile<Rows, Cols, true>(p, values + d, count, dim, 0, out + d, ldo, alpha);
    }
    if constexpr (Cols > 1)
        weigh_rows<Rows, Cols / 2>(p, values, count, dim, d, out, ldo, alpha, ahead);
    else if (d < dim)
        weigh_tile<Rows, 1, false>(p, values + d, count, dim, dim - d, out + d, ldo, alpha);
}

template <int Rows, class T>
inline void weigh_all(int64_t rows, const float* p, const T* values, int64_t count, int64_t dim, float* out,
                      int64_t ldo, const float* alpha, Ahead& ahead) {
    constexpr int Cols = 2 * kValueRows / Rows < 8 ? 2 * kValueRows / Rows : 8;
    for (; rows >= Rows; rows -= Rows, p += Rows * kKeyBlock, out += Rows * ldo, alpha += Rows)
        weigh_rows<Rows, Cols>(p, values, count, dim, 0, out, ldo, alpha, ahead);
    if constexpr (Rows > 1) weigh_all<Rows / 2>(rows, p, values, count, dim, out, ldo, alpha, ahead);
}

// One row of a key block: scores become exp(score - maximum), 0 from `visible` to `count`. Updates the row's maximum
// and sum; returns what the row's earlier results must be multiplied with.
inline float soften(float* scores, int64_t visible, int64_t count, float& maximum_so_far, float& sum_so_far) {
    const Vec lowest = broadcast(-__builtin_inff());
    for (int64_t l = visible; l < round_up(count, kLanes); ++l) scores[l] = -__builtin_inff();
    Vec top = lowest;
    for (int64_t l = 0; l < count; l += kLanes) top = maximum(load(scores + l), top);
    const float block = largest(top);
    const float high = block > maximum_so_far ? block : maximum_so_far;
    Vec total = zero();
    for (int64_t l = 0; l < count; l += kLanes) {
        const Vec e = exponential(load(scores + l) - broadcast(high));
        store(scores + l, e);
        total = total + e;
    }
    const float alpha = exponential(broadcast(maximum_so_far - high))[0];
    sum_so_far = sum_so_far * alpha + sum(total);
    maximum_so_far = high;
    return alpha;
}

// Of `count` keys from `first` on, those that a row sees: it is a token's, and sees that token and all before.
inline int64_t visible_of(const AttentionArgs& args, int64_t row, int64_t first, int64_t count) {
    const int64_t seen = args.past + row / args.group() + 1 - first;
    return seen < 0 ? 0 : least(seen, count);
}

// Where the keys end that any row of a unit sees.
inline int64_t end_of(const AttentionArgs& args, const AttentionUnit& unit) {
    return visible_of(args, unit.row1 - 1, 0, unit.key1);
}

// A row's maximum and sum before its first key.
inline void begin_row(float& maximum_so_far, float& sum_so_far) {
    maximum_so_far = -1e30f;  // finite, so that a row that sees none of these keys has alpha 1 and no NaN
    sum_so_far = 0;
}

template <class T>
void partial_of(const AttentionArgs& args, const AttentionUnit& unit, float* scratch, float* partial) {
    const int64_t rows = unit.rows(), dim = args.head_dim, wide = padded(dim);
    const T* keys = static_cast<const T*>(args.cache_k) + unit.kv_head * args.capacity * dim;
    const T* values = static_cast<const T*>(args.cache_v) + unit.kv_head * args.capacity * dim;
    float* q = scratch;                             // [rows, wide]
    float* out = q + kRowBlock * wide;              // few rows: [rows, wide]; else panels [wide / kStrip][rows][kStrip]
    float* packed = out + kRowBlock * wide;         // panels of keys, then of values in their place
    float* scores = packed + kKeyBlock * wide;      // [rows, kKeyBlock]
    float* alpha = scores + kRowBlock * kKeyBlock;  // [rows]
    float* high = partial + rows * dim;             // [rows]
    float* total = high + rows;                     // [rows]
    const bool few = rows <= kFewRows;

    std::memset(out, 0, rows * wide * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(q + r * wide, row_of(args, unit.kv_head, unit.row0 + r), dim * sizeof(float));
        std::memset(q + r * wide + dim, 0, (wide - dim) * sizeof(float));
        begin_row(high[r], total[r]);
    }
    const int64_t end = end_of(args, unit);
    for (int64_t first = unit.key0; first < end; first += kKeyBlock) {
        const int64_t count = least(kKeyBlock, end - first), following = least(kKeyBlock, end - first - count);
        const T *block = keys + first * dim, *value_block = values + first * dim;
        const T* next_block = block + count * dim;
        if (few) {
            Ahead ahead(value_block, count * dim, (rows + 3) / 4 * (count * 4 / kDots + 1));
            score_all<4>(rows, q, wide, block, count, dim, scores, ahead);
        } else {
            pack_transposed(block, count, dim, dim, packed);
            for (int64_t c = 0; c < count; c += kStrip)
                multiply(rows, dim, {q, wide, 1}, packed + c * dim, scores + c, kKeyBlock, nullptr);
        }
        Ahead ahead_of_pack(value_block, few ? 0 : count * dim, rows);
        for (int64_t r = 0; r < rows; ++r) {
            ahead_of_pack.step();
            const int64_t visible = visible_of(args, unit.row0 + r, first, count);
            alpha[r] = soften(scores + r * kKeyBlock, visible, count, high[r], total[r]);
        }
        if (few) {
            Ahead ahead(next_block, following * dim, (rows * dim) / (2 * kValueRows * kLanes) + 1);
            weigh_all<kValueRows>(rows, scores, value_block, count, dim, out, wide, alpha, ahead);
        } else {
            pack(value_block, count, dim, dim, packed);
            Ahead ahead(next_block, following * dim, wide / kStrip);
            for (int64_t c = 0; c < dim; c += kStrip) {
                ahead.step();
                multiply(rows, count, {scores, kKeyBlock, 1}, packed + c * count, out + c * rows, kStrip, alpha);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < dim; c += kStrip)
            std::memcpy(partial + r * dim + c, few ? out + r * wide + c : out + c * rows + r * kStrip,
                        least(kStrip, dim - c) * sizeof(float));
}

void attention_partial(const AttentionArgs& args, const AttentionUnit& unit, float* scratch, float* partial) {
    args.half ? partial_of<Half>(args, unit, scratch, partial) : partial_of<float>(args, unit, scratch, partial);
}

void attention_finish(const AttentionArgs& args, const AttentionUnit& unit, const float* partials, int64_t splits) {
    const int64_t rows = unit.rows(), dim = args.head_dim, size = partial_floats(rows, dim), group = args.group();
    for (int64_t r = 0; r < rows; ++r) {
        const float* high = partials + rows * dim + r;
        float top = high[0], total = 0;
        for (int64_t s = 1; s < splits; ++s) top = high[s * size] > top ? high[s * size] : top;
        for (int64_t s = 0; s < splits; ++s)
            total += exponential(broadcast(high[s * size] - top))[0] * high[s * size + rows];
        float* out = row_of(args, unit.kv_head, unit.row0 + r);
        const int64_t head = (unit.row0 + r) / group * args.heads + unit.kv_head * group + (unit.row0 + r) % group;
        const float* gate = args.q + head * 2 * dim + dim;
        for (int64_t s = 0; s < splits; ++s) {
            const Vec scale = exponential(broadcast(high[s * size] - top)) / broadcast(total);
            const bool last = s + 1 == splits;
            for (int64_t d = 0; d < dim; d += kLanes) {
                Vec acc = load_row(partials + s * size + r * dim, d, dim) * scale;
                if (s > 0) acc = acc + load_row(out, d, dim);
                if (last && args.gated) acc = acc * sigmoid(load_row(gate, d, dim));
                store_row(out, d, dim, acc);
            }
        }
    }
}

}  // namespace
}  // namespace moestream
