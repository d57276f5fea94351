// AVX2 with FMA, F16C and BMI2 (Haswell, Zen 1 and later).
#include <immintrin.h>

#include "cpu/matrix/kernels.h"

namespace moestream {
namespace {

using VF = __m256;
using VI = __m256i;
using VB = __m256i;

constexpr int kLanes = 8;
constexpr int kVectorRows = 4;  // matrix rows a vector product with several activation rows works on at once
constexpr int kTileRows = 4;    // activation rows a tile product works on at once
constexpr int affine_together(int) { return kVectorRows; }  // matrix rows an affine vector product works on at once

// The first n lanes set, for masked loads and stores.
inline __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline VF zero_f() { return _mm256_setzero_ps(); }
inline VI zero_i() { return _mm256_setzero_si256(); }
inline VB zero_b() { return _mm256_setzero_si256(); }
inline VF set_f(float v) { return _mm256_set1_ps(v); }
inline VF load_f(const float* p) { return _mm256_loadu_ps(p); }
inline VF load_f_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_f(float* p, VF v) { _mm256_storeu_ps(p, v); }
inline void store_f_n(float* p, VF v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
inline VB load_b(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_b(void* p, VB v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline void store_i8(int8_t* p, VI v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline VI as_i(VB v) { return v; }

inline __m128i load_bytes_n(const uint8_t* p, int n) {
    __m128i v = _mm_setzero_si128();
    __builtin_memcpy(&v, p, static_cast<std::size_t>(n));
    return v;
}
inline __m128i load_16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline VF widen_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline VF load_bf16(const uint8_t* p) { return widen_bf16(load_16(p)); }
inline VF load_bf16_n(const uint8_t* p, int n) { return widen_bf16(load_bytes_n(p, 2 * n)); }
inline VF load_f16(const uint8_t* p) { return _mm256_cvtph_ps(load_16(p)); }
inline VF load_f16_n(const uint8_t* p, int n) { return _mm256_cvtph_ps(load_bytes_n(p, 2 * n)); }
inline VF load_f32(const uint8_t* p) { return _mm256_castsi256_ps(load_b(p)); }
inline VF load_f32_n(const uint8_t* p, int n) {
    return _mm256_castsi256_ps(_mm256_maskload_epi32(reinterpret_cast<const int*>(p), first_lanes(n)));
}

inline VF add_f(VF a, VF b) { return _mm256_add_ps(a, b); }
inline VF sub_f(VF a, VF b) { return _mm256_sub_ps(a, b); }
inline VF mul_f(VF a, VF b) { return _mm256_mul_ps(a, b); }
inline VF div_f(VF a, VF b) { return _mm256_div_ps(a, b); }
inline VF max_f(VF a, VF b) { return _mm256_max_ps(a, b); }
inline VF min_f(VF a, VF b) { return _mm256_min_ps(a, b); }
inline VF abs_f(VF a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), a); }
inline VF fma_f(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
inline VF scale_by_power(VF a, VI n) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
}
inline float first_f(VF v) { return _mm256_cvtss_f32(v); }
inline float sum_f(VF v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float max_of(VF v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline VI add_i(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline int32_t sum_i(VI v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline VF to_float(VI v) { return _mm256_cvtepi32_ps(v); }
inline VI round_i(VF v) { return _mm256_cvtps_epi32(v); }
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
inline VB opaque(VB v) {
    asm volatile("" : "+x"(v));
    return v;
}

// acc[lane] += sum of four unsigned codes times four signed values. Pairs are summed in int16, which codes below 64
// cannot overflow (2 * 63 * 127); wide codes go as two nibbles.
template <bool Wide>
inline VI dot(VI acc, VB codes, VB values) {
    const __m256i one = _mm256_set1_epi16(1);
    if constexpr (Wide) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), values);
        const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), values);
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, one));
        return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    } else {
        return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, values), one));
    }
}

inline VB broadcast_word(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
}

// Byte m of every lane as a float.
inline void expand(VB codes, VF* out) {
    const __m256i byte = _mm256_set1_epi32(255);
    out[0] = _mm256_cvtepi32_ps(_mm256_and_si256(codes, byte));
    out[1] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes, 8), byte));
    out[2] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes, 16), byte));
    out[3] = _mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 24));
}

// Counts lanes over the steps of a block; lane l of step u belongs to group (u * kLanes + l) >> shift.
using Counter = __m256i;
inline Counter first_step() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Counter next_step(Counter c) { return _mm256_add_epi32(c, _mm256_set1_epi32(kLanes)); }
// Every lane's value of the block whose groups are v's lanes.
inline VF spread(VF v, Counter c, int shift) {
    return _mm256_permutevar8x32_ps(v, _mm256_srl_epi32(c, _mm_cvtsi32_si128(shift)));
}

inline void transpose_f(VF* v) {
    VF a[8];
    VF b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xee);
        }
    for (int j = 0; j < 4; ++j) {
        v[j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
        v[4 + j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
    }
}

inline void transpose_b(VB* v) {
    VF words[8];
    for (int i = 0; i < 8; ++i) words[i] = _mm256_castsi256_ps(v[i]);
    transpose_f(words);
    for (int i = 0; i < 8; ++i) v[i] = _mm256_castps_si256(words[i]);
}

// Codes of one step of a matrix row. load reads kBytes; load_n fewer, giving zeros for the rest.
// 2, 3 and 6 bits: eight codes are Bits bytes, which pdep spreads over the bytes of a word.
template <int Bits>
struct Codes {
    static constexpr int kVectors = 1;
    static constexpr int kColumns = 32;
    static constexpr int kBytes = 4 * Bits;
    static VB load(const uint8_t* p) {
        long long words[4];
        for (int i = 0; i < 4; ++i) {
            uint64_t packed = 0;
            __builtin_memcpy(&packed, p + i * Bits, Bits);
            words[i] = static_cast<long long>(_pdep_u64(packed, 0x0101010101010101U * ((1U << Bits) - 1)));
        }
        return _mm256_setr_epi64x(words[0], words[1], words[2], words[3]);
    }
    static VB load_n(const uint8_t* p, int n) {
        uint8_t padded[kBytes] = {};
        __builtin_memcpy(padded, p, static_cast<std::size_t>(n));
        return load(padded);
    }
    static void split(VB codes, VB* out) { out[0] = codes; }
};

inline VB load_wide_n(const uint8_t* p, int n) {
    VB v = _mm256_setzero_si256();
    __builtin_memcpy(&v, p, static_cast<std::size_t>(n));
    return v;
}

template <>
struct Codes<4> {
    static constexpr int kVectors = 2;  // even columns, odd columns
    static constexpr int kColumns = 64;
    static constexpr int kBytes = 32;
    static VB load(const uint8_t* p) { return load_b(p); }
    static VB load_n(const uint8_t* p, int n) { return load_wide_n(p, n); }
    static void split(VB packed, VB* out) {
        const __m256i nibble = _mm256_set1_epi8(15);
        out[0] = _mm256_and_si256(packed, nibble);
        out[1] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
    }
};

template <>
struct Codes<8> {
    static constexpr int kVectors = 1;
    static constexpr int kColumns = 32;
    static constexpr int kBytes = 32;
    static VB load(const uint8_t* p) { return load_b(p); }
    static VB load_n(const uint8_t* p, int n) { return load_wide_n(p, n); }
    static void split(VB codes, VB* out) { out[0] = codes; }
};

#include "cpu/matrix/tier.h"

}  // namespace

const MatrixKernels& matrix_kernels_avx2() { return kTable; }

}  // namespace moestream
