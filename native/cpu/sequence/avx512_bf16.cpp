// AVX-512 tier with dot products of bfloat16 pairs (Cooper Lake, Zen 4 and later): twice as many as of float32.
#include "cpu/sequence/avx512.h"

namespace moestream {
namespace {

// Lane i is the pair (even[i], odd[i]), rounded to nearest.
inline Vec pairs_of(Vec even, Vec odd) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), rounded));
}
// Lane i is the pair of elements 2 i and 2 i + 1 of low and then high.
inline Vec adjacent_pairs(Vec low, Vec high) { return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(high, low)); }
// acc[i] + a[i].even * b[i].even + a[i].odd * b[i].odd
inline Vec dot_pairs(Vec acc, Vec a, Vec b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// 32 halves as pairs of neighbours, kHalfShift times too small: an exponent of 5 bits is read as one of 8. Numbers
// below 2^-14 count as zero, as these products take them. Integer steps, because conversions compete with the products.
constexpr float kHalfShift = 0x1p112f;
inline Vec pairs_of_halves(const uint16_t* p) {
    const __m512i rounded = _mm512_add_epi16(_mm512_loadu_si512(p), _mm512_set1_epi16(4));
    const __m512i sign_and_rest = _mm512_set1_epi16(static_cast<int16_t>(0x8fff));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_srai_epi16(rounded, 3), sign_and_rest));
}
// Pairs (even, odd) of 32 columns from two rows: columns 8 j to 8 j + 3 in low, the next four in high.
inline Vec zip_low(Vec even, Vec odd) {
    return _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_castps_si512(even), _mm512_castps_si512(odd)));
}
inline Vec zip_high(Vec even, Vec odd) {
    return _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_castps_si512(even), _mm512_castps_si512(odd)));
}
// 32 columns in the order of zip_low and zip_high, stored in their own.
inline void store_unzipped(float* p, Vec low, Vec high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    store(p, _mm512_permutex2var_ps(low, first, high));
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    store(p + kLanes, _mm512_permutex2var_ps(low, second, high));
}

}  // namespace
}  // namespace moestream

#include "cpu/sequence/body.h"
#include "cpu/sequence/body_attention_pairs.h"

namespace moestream {
// Initialised at compile time: code of this file may not run on other machines.
constinit const SequenceKernels kSequenceAvx512Bf16 = [] {
    SequenceKernels table = kTable;
    table.attention_partial = attention_partial_pairs;
    return table;
}();
}  // namespace moestream
