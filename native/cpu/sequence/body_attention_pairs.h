// Attention over a float16 cache with dot products of bfloat16 pairs; accumulators, softmax and its sums stay float32.
// A pair is one float-sized lane; the tier provides what makes pairs, and dot_pairs.
#pragma once
#include "cpu/sequence/body_attention.h"

namespace moestream {
namespace {

// As tile() of tile.h: C [Rows, kStrip] = diag(alpha) C + A B, with pairs along the inner dimension.
template <int Rows>
inline void pair_tile(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                      const float* alpha) {
    if constexpr (Rows > 1)
        if (rows < Rows) return pair_tile<Rows - 1>(rows, depth, a, lda, b, c, ldc, alpha);
    Vec acc[Rows][kTileCols];
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < kTileCols; ++n)
            acc[m][n] = alpha ? load(c + m * ldc + n * kLanes) * broadcast(alpha[m]) : zero();
    for (int64_t k = 0; k < depth; ++k, b += kStrip) {
        Vec right[kTileCols];
        for (int n = 0; n < kTileCols; ++n) right[n] = load(b + n * kLanes);
        for (int m = 0; m < Rows; ++m) {
            const Vec x = broadcast(a[m * lda + k]);
            for (int n = 0; n < kTileCols; ++n) acc[m][n] = dot_pairs(acc[m][n], x, right[n]);
        }
    }
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < kTileCols; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
}

inline void multiply_pairs(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, float* c,
                           int64_t ldc, const float* alpha) {
    for (int64_t m = 0; m < rows; m += kTileRows)
        pair_tile<kTileRows>(least(kTileRows, rows - m), depth, a + m * lda, lda, b, c + m * ldc, ldc,
                             alpha ? alpha + m : nullptr);
}

template <class T>
inline Vec part_of(const T* row, int64_t i, int64_t n) {
    return i < n ? load_row(row, i, n) : zero();
}

// A row of n, times `scale`, as pairs of neighbours, padded with zeros to `wide`.
inline void pair_row(const float* row, int64_t n, int64_t wide, float* pairs, float scale = 1) {
    const Vec factor = broadcast(scale);
    for (int64_t i = 0; i < wide; i += 2 * kLanes)
        store(pairs + i / 2, adjacent_pairs(part_of(row, i, n) * factor, part_of(row, i + kLanes, n) * factor));
}

// Keys [count, dim] transposed: panels [kKeyBlock / kStrip][wide / 2][kStrip] of pairs along the head.
inline void pair_keys(const Half* keys, int64_t count, int64_t dim, int64_t wide, float* panels) {
    for (int64_t i = 0; i < count; i += kLanes)
        for (int64_t d = 0; d < wide; d += 2 * kLanes) {
            Vec block[kLanes];
            for (int64_t r = 0; r < kLanes; ++r) {
                const Half* key = keys + (i + r) * dim;
                block[r] = i + r < count ? adjacent_pairs(part_of(key, d, dim), part_of(key, d + kLanes, dim)) : zero();
            }
            transpose(block);
            float* to = panels + i / kStrip * (wide / 2) * kStrip + d / 2 * kStrip + i % kStrip;
            for (int64_t r = 0; r < kLanes; ++r) store(to + r * kStrip, block[r]);
        }
}

// Values [count, dim]: panels [wide / kStrip][ceil(count / 2)][kStrip] of pairs along the keys.
inline void pair_values(const Half* values, int64_t count, int64_t dim, int64_t wide, float* panels) {
    const int64_t depth = (count + 1) / 2;
    for (int64_t l = 0; l < depth; ++l) {
        const Half* even = values + 2 * l * dim;
        for (int64_t d = 0; d < wide; d += kLanes) {
            const Vec odd = 2 * l + 1 < count ? part_of(even + dim, d, dim) : zero();
            store(panels + d / kStrip * depth * kStrip + l * kStrip + d % kStrip, pairs_of(part_of(even, d, dim), odd));
        }
    }
}

constexpr int64_t kFewKeys = 256;     // keys of a block beside few rows: longer ones cost less to begin
constexpr int64_t kKeysAhead = 4096;  // bytes of keys asked for before they are needed

// As score_rows(), of queries given as pairs; the head is a multiple of a vector of pairs.
template <int Rows>
inline void score_pairs(const float* q, int64_t ldq, const Half* keys, int64_t count, int64_t dim, float* scores,
                        Ahead& ahead) {
    constexpr int Keys = kDots / Rows;
    for (int64_t l = 0; l < count; l += Keys) {
        ahead.step();
        const char* later = reinterpret_cast<const char*>(keys + l * dim) + kKeysAhead;
        for (int64_t i = 0; i < Keys * dim * static_cast<int64_t>(sizeof(Half)); i += 64)
            __builtin_prefetch(later + i, 0, 3);
        const uint16_t* key[Keys];
        for (int j = 0; j < Keys; ++j) key[j] = &keys[least(l + j, count - 1) * dim].bits;
        Vec acc[kDots];
        for (int i = 0; i < kDots; ++i) acc[i] = zero();
        for (int64_t d = 0; d < dim; d += 2 * kLanes) {
            Vec k[Keys];
            for (int j = 0; j < Keys; ++j) k[j] = pairs_of_halves(key[j] + d);
            for (int m = 0; m < Rows; ++m) {
                const Vec x = load(q + m * ldq + d / 2);
                for (int j = 0; j < Keys; ++j) acc[m * Keys + j] = dot_pairs(acc[m * Keys + j], x, k[j]);
            }
        }
        float dots[kDots];
        store(dots, sums(acc));
        for (int m = 0; m < Rows; ++m) std::memcpy(scores + m * kFewKeys + l, dots + m * Keys, Keys * sizeof(float));
    }
}

template <int Rows>
inline void score_all_pairs(int64_t rows, const float* q, int64_t ldq, const Half* keys, int64_t count, int64_t dim,
                            float* scores, Ahead& ahead) {
    for (; rows >= Rows; rows -= Rows, q += Rows * ldq, scores += Rows * kFewKeys)
        score_pairs<Rows>(q, ldq, keys, count, dim, scores, ahead);
    if constexpr (Rows > 1) score_all_pairs<Rows / 2>(rows, q, ldq, keys, count, dim, scores, ahead);
}

// Two vectors of columns of O [Rows] = diag(alpha) O + P V, in the order of zip_low and zip_high; weights are pairs.
template <int Rows>
inline void weigh_pairs(const float* weights, const Half* values, int64_t count, int64_t dim, float* out, int64_t ldo,
                        const float* alpha, Ahead& ahead) {
    Vec low[Rows], high[Rows];
    for (int m = 0; m < Rows; ++m) {
        low[m] = load(out + m * ldo) * broadcast(alpha[m]);
        high[m] = load(out + m * ldo + kLanes) * broadcast(alpha[m]);
    }
    for (int64_t l = 0; l < count; l += 2) {
        ahead.step();
        const Half* row = values + l * dim;
        const Vec even = pairs_of_halves(&row->bits);
        const Vec odd = pairs_of_halves(l + 1 < count ? &row[dim].bits : &row->bits);  // past the end: its weight is 0
        const Vec left = zip_low(even, odd), right = zip_high(even, odd);
        for (int m = 0; m < Rows; ++m) {
            const Vec x = broadcast(weights[m * (kFewKeys / 2) + l / 2]);
            low[m] = dot_pairs(low[m], x, left);
            high[m] = dot_pairs(high[m], x, right);
        }
    }
    for (int m = 0; m < Rows; ++m) {
        store(out + m * ldo, low[m]);
        store(out + m * ldo + kLanes, high[m]);
    }
}

template <int Rows>
inline void weigh_all_pairs(int64_t rows, const float* weights, const Half* values, int64_t count, int64_t dim,
                            float* out, int64_t ldo, const float* alpha, Ahead& ahead) {
    for (; rows >= Rows; rows -= Rows, weights += Rows * (kFewKeys / 2), out += Rows * ldo, alpha += Rows)
        for (int64_t d = 0; d < dim; d += 2 * kLanes)
            weigh_pairs<Rows>(weights, values + d, count, dim, out + d, ldo, alpha, ahead);
    if constexpr (Rows > 1) weigh_all_pairs<Rows / 2>(rows, weights, values, count, dim, out, ldo, alpha, ahead);
}

// Few rows, as in decoding: keys and values are read as they lie.
void attention_few_pairs(const AttentionArgs& args, const AttentionUnit& unit, float* scratch, float* partial) {
    const int64_t rows = unit.rows(), dim = args.head_dim;
    const Half* keys = static_cast<const Half*>(args.cache_k) + unit.kv_head * args.capacity * dim;
    const Half* values = static_cast<const Half*>(args.cache_v) + unit.kv_head * args.capacity * dim;
    float* q = scratch;                             // [rows, dim / 2] pairs
    float* out = q + kFewRows * dim;                // [rows, dim], columns as weigh_pairs() has them
    float* scores = out + kFewRows * dim;           // [rows, kFewKeys]
    float* weights = scores + kFewRows * kFewKeys;  // [rows, kFewKeys / 2] pairs
    float* alpha = weights + kFewRows * kFewKeys;   // [rows]
    float* high = partial + rows * dim;             // [rows]
    float* total = high + rows;                     // [rows]

    std::memset(out, 0, rows * dim * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
        pair_row(row_of(args, unit.kv_head, unit.row0 + r), dim, dim, q + r * (dim / 2), kHalfShift);
        begin_row(high[r], total[r]);
    }
    const int64_t end = end_of(args, unit);
    for (int64_t first = unit.key0; first < end; first += kFewKeys) {
        const int64_t count = least(kFewKeys, end - first), following = least(kFewKeys, end - first - count);
        const Half *block = keys + first * dim, *value_block = values + first * dim;
        Ahead ahead_of_values(value_block, count * dim, rows * count / kDots + 1);
        score_all_pairs<8>(rows, q, dim / 2, block, count, dim, scores, ahead_of_values);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t visible = visible_of(args, unit.row0 + r, first, count);
            float* row = scores + r * kFewKeys;
            alpha[r] = soften(row, visible, count, high[r], total[r]);
            pair_row(row, round_up(count, kLanes), kFewKeys, weights + r * (kFewKeys / 2), kHalfShift);
        }
        Ahead ahead(block + count * dim, following * dim, (rows + 7) / 8 * (dim / (2 * kLanes)) * (count / 2) + 1);
        weigh_all_pairs<8>(rows, weights, value_block, count, dim, out, dim, alpha, ahead);
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < dim; d += 2 * kLanes)
            store_unzipped(partial + r * dim + d, load(out + r * dim + d), load(out + r * dim + d + kLanes));
}

void attention_partial_pairs(const AttentionArgs& args, const AttentionUnit& unit, float* scratch, float* partial) {
    const int64_t rows = unit.rows(), dim = args.head_dim, wide = padded(dim);
    const bool few = rows <= kFewRows;
    if (!args.half || (few && dim % (2 * kLanes))) return attention_partial(args, unit, scratch, partial);
    if (few) return attention_few_pairs(args, unit, scratch, partial);
    const Half* keys = static_cast<const Half*>(args.cache_k) + unit.kv_head * args.capacity * dim;
    const Half* values = static_cast<const Half*>(args.cache_v) + unit.kv_head * args.capacity * dim;
    float* q = scratch;                             // [rows, wide / 2] pairs
    float* weights = q + kRowBlock * wide / 2;      // [rows, kKeyBlock / 2] pairs; wide is at least kKeyBlock
    float* out = q + kRowBlock * wide;              // panels [wide / kStrip][rows][kStrip]
    float* packed = out + kRowBlock * wide;         // keys, then values in their place
    float* scores = packed + kKeyBlock * wide;      // [rows, kKeyBlock]
    float* alpha = scores + kRowBlock * kKeyBlock;  // [rows]
    float* high = partial + rows * dim;             // [rows]
    float* total = high + rows;                     // [rows]

    std::memset(out, 0, rows * wide * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
        pair_row(row_of(args, unit.kv_head, unit.row0 + r), dim, wide, q + r * (wide / 2));
        begin_row(high[r], total[r]);
    }
    const int64_t end = end_of(args, unit);
    for (int64_t first = unit.key0; first < end; first += kKeyBlock) {
        const int64_t count = least(kKeyBlock, end - first), following = least(kKeyBlock, end - first - count);
        const int64_t depth = (count + 1) / 2;
        const Half *block = keys + first * dim, *value_block = values + first * dim;
        pair_keys(block, count, dim, wide, packed);
        for (int64_t c = 0; c < count; c += kStrip)
            multiply_pairs(rows, wide / 2, q, wide / 2, packed + c * (wide / 2), scores + c, kKeyBlock, nullptr);
        Ahead ahead_of_values(value_block, count * dim, rows);
        for (int64_t r = 0; r < rows; ++r) {
            ahead_of_values.step();
            const int64_t visible = visible_of(args, unit.row0 + r, first, count);
            float* row = scores + r * kKeyBlock;
            alpha[r] = soften(row, visible, count, high[r], total[r]);
            pair_row(row, round_up(count, kLanes), kKeyBlock, weights + r * (kKeyBlock / 2));
        }
        pair_values(value_block, count, dim, wide, packed);
        Ahead ahead(block + count * dim, following * dim, wide / kStrip);
        for (int64_t c = 0; c < dim; c += kStrip) {
            ahead.step();
            multiply_pairs(rows, depth, weights, kKeyBlock / 2, packed + c * depth, out + c * rows, kStrip, alpha);
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < dim; c += kStrip)
            std::memcpy(partial + r * dim + c, out + c * rows + r * kStrip, least(kStrip, dim - c) * sizeof(float));
}

}  // namespace
}  // namespace moestream
