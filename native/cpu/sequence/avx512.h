// Primitives of the AVX-512 tiers. Included by their files only.
#pragma once
#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 reports its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/sequence/kernels.h"

namespace moestream {
namespace {

using Vec = float __attribute__((vector_size(64)));
using IntVec = uint32_t __attribute__((vector_size(64)));

constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // 8 x 2 accumulators: 10 loads for 16 fused multiply-adds
constexpr int kTileCols = 2;
constexpr int kDots = 16;  // dot products in flight
constexpr int kValueRows = 8;
constexpr int kStateCols = 4;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_half(uint16_t* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }

// Lane i of the result is the sum of rows[i].
[[gnu::always_inline]] inline Vec sums(const Vec* rows) {
    __m512 quads[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 a = rows[4 * i], b = rows[4 * i + 1], c = rows[4 * i + 2], d = rows[4 * i + 3];
        const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
        const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
        quads[i] = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);  // each 128-bit lane [a b c d]
    }
    const __m512 lo = _mm512_shuffle_f32x4(quads[0], quads[1], 0x88) + _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd);
    const __m512 hi = _mm512_shuffle_f32x4(quads[2], quads[3], 0x88) + _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd);
    return _mm512_shuffle_f32x4(lo, hi, 0x88) + _mm512_shuffle_f32x4(lo, hi, 0xdd);
}

inline void transpose(Vec* rows) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512 a = _mm512_unpacklo_ps(rows[i], rows[i + 1]), b = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        const __m512 c = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]);
        const __m512 d = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {  // t[4 j + i] holds column i of each 4 x 4 block of rows 4 j
        const __m512 a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        rows[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
        rows[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
        rows[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

}  // namespace
}  // namespace moestream
