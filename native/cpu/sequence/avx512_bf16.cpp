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
