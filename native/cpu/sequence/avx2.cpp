// AVX2 tier (with FMA and F16C).
#include <immintrin.h>

#include "cpu/sequence/kernels.h"

namespace moestream {
namespace {

using Vec = float __attribute__((vector_size(32)));
using IntVec = uint32_t __attribute__((vector_size(32)));

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators leave 4 of the 16 registers
constexpr int kTileCols = 2;
constexpr int kDots = 8;
constexpr int kValueRows = 4;
constexpr int kStateCols = 4;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_half(uint16_t* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline float sum(Vec v) {
    __m128 x = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
    x = x + _mm_movehl_ps(x, x);
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Vec v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Lane i of the result is the sum of rows[i].
inline Vec sums(const Vec* rows) {
    __m256 quads[2];
    for (int i = 0; i < 2; ++i) {
        const __m256 a = rows[4 * i], b = rows[4 * i + 1], c = rows[4 * i + 2], d = rows[4 * i + 3];
        const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
        const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
        quads[i] = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);  // each 128-bit lane [a b c d]
    }
    return _mm256_permute2f128_ps(quads[0], quads[1], 0x20) + _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
}

inline void transpose(Vec* rows) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) {
        const __m256 a = _mm256_unpacklo_ps(rows[i], rows[i + 1]), b = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        const __m256 c = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]);
        const __m256 d = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
        rows[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
    }
}

}  // namespace
}  // namespace moestream

#include "cpu/sequence/body.h"

namespace moestream {
const SequenceKernels kSequenceAvx2 = kTable;
}
