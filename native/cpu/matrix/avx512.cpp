// AVX-512 with VNNI (Cascade Lake, Zen 4 and later).
#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own _mm512_undefined_*() (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/matrix/kernels.h"

namespace moestream {
namespace {

using VF = __m512;
using VI = __m512i;
using VB = __m512i;

constexpr int kLanes = 16;
constexpr int kVectorRows = 4;  // matrix rows a vector product with several activation rows works on at once
constexpr int kTileRows = 8;    // activation rows a tile product works on at once
// Matrix rows an affine vector product works on at once. One after another, memory is read as one stream; together,
// rows share what is loaded of the activations, which pays where codes cost more to unpack than to read.
constexpr int affine_together(int bits) { return bits >= 4 ? 1 : kVectorRows; }

inline __mmask16 first_lanes(int n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1U << n) - 1); }

inline VF zero_f() { return _mm512_setzero_ps(); }
inline VI zero_i() { return _mm512_setzero_si512(); }
inline VB zero_b() { return _mm512_setzero_si512(); }
inline VF set_f(float v) { return _mm512_set1_ps(v); }
inline VF load_f(const float* p) { return _mm512_loadu_ps(p); }
inline VF load_f_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_f(float* p, VF v) { _mm512_storeu_ps(p, v); }
inline void store_f_n(float* p, VF v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
inline VB load_b(const void* p) { return _mm512_loadu_si512(p); }
inline void store_b(void* p, VB v) { _mm512_storeu_si512(p, v); }
inline void store_i8(int8_t* p, VI v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v)); }
inline VI as_i(VB v) { return v; }

inline VF widen_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m256i load_16_n(const uint8_t* p, int n) { return _mm256_maskz_loadu_epi16(first_lanes(n), p); }
inline __m256i load_16(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline VF load_bf16(const uint8_t* p) { return widen_bf16(load_16(p)); }
inline VF load_bf16_n(const uint8_t* p, int n) { return widen_bf16(load_16_n(p, n)); }
inline VF load_f16(const uint8_t* p) { return _mm512_cvtph_ps(load_16(p)); }
inline VF load_f16_n(const uint8_t* p, int n) { return _mm512_cvtph_ps(load_16_n(p, n)); }
inline VF load_f32(const uint8_t* p) { return _mm512_loadu_ps(p); }
inline VF load_f32_n(const uint8_t* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }

inline VF add_f(VF a, VF b) { return _mm512_add_ps(a, b); }
inline VF sub_f(VF a, VF b) { return _mm512_sub_ps(a, b); }
inline VF mul_f(VF a, VF b) { return _mm512_mul_ps(a, b); }
inline VF div_f(VF a, VF b) { return _mm512_div_ps(a, b); }
inline VF max_f(VF a, VF b) { return _mm512_max_ps(a, b); }
inline VF min_f(VF a, VF b) { return _mm512_min_ps(a, b); }
inline VF abs_f(VF a) { return _mm512_abs_ps(a); }
inline VF fma_f(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
inline VF scale_by_power(VF a, VI n) { return _mm512_scalef_ps(a, _mm512_cvtepi32_ps(n)); }
inline float sum_f(VF v) { return _mm512_reduce_add_ps(v); }
inline float max_of(VF v) { return _mm512_reduce_max_ps(v); }
inline float first_f(VF v) { return _mm512_cvtss_f32(v); }
inline VI add_i(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline int32_t sum_i(VI v) { return _mm512_reduce_add_epi32(v); }
inline VF to_float(VI v) { return _mm512_cvtepi32_ps(v); }
inline VI round_i(VF v) { return _mm512_cvtps_epi32(v); }
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
inline VB opaque(VB v) {
    return v;
}  // dot() below is opaque itself, and a copy for each would cost a sixth of the peak

// acc[lane] += sum of four unsigned codes times four signed values.
template <bool Wide>
inline VI dot(VI acc, VB codes, VB values) {
    // The intrinsic, but GCC 12 copies every accumulator of a loop around it.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(values));
    return acc;
}

inline VB broadcast_word(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}

// Byte m of every lane as a float.
inline void expand(VB codes, VF* out) {
    const __m512i byte = _mm512_set1_epi32(255);
    out[0] = _mm512_cvtepi32_ps(_mm512_and_si512(codes, byte));
    out[1] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(codes, 8), byte));
    out[2] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(codes, 16), byte));
    out[3] = _mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 24));
}

// Counts lanes over the steps of a block; lane l of step u belongs to group (u * kLanes + l) >> shift.
using Counter = __m512i;
inline Counter first_step() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Counter next_step(Counter c) { return _mm512_add_epi32(c, _mm512_set1_epi32(kLanes)); }
// Every lane's value of the block whose groups are v's lanes.
inline VF spread(VF v, Counter c, int shift) {
    return _mm512_permutexvar_ps(_mm512_srl_epi32(c, _mm_cvtsi32_si128(shift)), v);
}

inline void transpose_b(VB* v) {
    __m512i a[16];
    __m512i b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int j = 0; j < 4; ++j) {  // b[4 i + j]: 128-bit block q holds column 4 q + j of rows 4 i .. 4 i + 3
        const __m512i lo0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
        const __m512i hi0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i lo1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i hi1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(lo0, lo1, 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(hi0, hi1, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(lo0, lo1, 0xdd);
        v[12 + j] = _mm512_shuffle_i32x4(hi0, hi1, 0xdd);
    }
}

inline void transpose_f(VF* v) {
    VB words[16];
    for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(v[i]);
    transpose_b(words);
    for (int i = 0; i < 16; ++i) v[i] = _mm512_castsi512_ps(words[i]);
}

inline VB load_bytes_n(const uint8_t* p, int n) { return _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p); }

// Codes of one step of a matrix row. load reads kBytes; load_n fewer, giving zeros for the rest.
template <int Bits>
struct Codes;

template <>
struct Codes<4> {
    static constexpr int kVectors = 2;  // even columns, odd columns
    static constexpr int kColumns = 128;
    static constexpr int kBytes = 64;
    static VB load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static VB load_n(const uint8_t* p, int n) { return load_bytes_n(p, n); }
    static void split(VB packed, VB* out) {
        const __m512i nibble = _mm512_set1_epi8(15);
        out[0] = _mm512_and_si512(packed, nibble);
        out[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
    }
};

template <>
struct Codes<8> {
    static constexpr int kVectors = 1;
    static constexpr int kColumns = 64;
    static constexpr int kBytes = 64;
    static VB load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static VB load_n(const uint8_t* p, int n) { return load_bytes_n(p, n); }
    static void split(VB codes, VB* out) { out[0] = codes; }
};

// 2, 3 and 6 bits: a 128-bit block gets the doublewords with its 16 codes, a word of it the two bytes with its 2 codes,
// which are shifted apart there.
template <int Bits>
struct Codes {
    static constexpr int kVectors = 1;
    static constexpr int kColumns = 64;
    static constexpr int kBytes = 8 * Bits;
    static VB load(const uint8_t* p) { return load_n(p, kBytes); }
    static VB load_n(const uint8_t* p, int n) {
        struct Tables {
            uint32_t doublewords[16];
            uint8_t bytes[64];
            uint16_t shifts[32];
        };
        alignas(64) static constexpr Tables kTables = [] {
            Tables t{};
            for (int i = 0; i < 16; ++i) t.doublewords[i] = static_cast<uint32_t>(i / 4 * 2 * Bits / 4 + i % 4) % 16;
            for (int word = 0; word < 32; ++word) {
                const int block_start = word / 8 * 2 * Bits % 4;  // of the block's codes in its first doubleword
                const int bit = 8 * block_start + word % 8 * 2 * Bits;
                t.bytes[2 * word] = static_cast<uint8_t>(bit / 8);
                t.bytes[2 * word + 1] = static_cast<uint8_t>(bit / 8 + 1);
                t.shifts[word] = static_cast<uint16_t>(bit % 8);
            }
            return t;
        }();
        const __m512i blocks = _mm512_permutexvar_epi32(_mm512_load_si512(kTables.doublewords), load_bytes_n(p, n));
        const __m512i words = _mm512_srlv_epi16(_mm512_shuffle_epi8(blocks, _mm512_load_si512(kTables.bytes)),
                                                _mm512_load_si512(kTables.shifts));
        const __m512i even = _mm512_and_si512(words, _mm512_set1_epi16((1 << Bits) - 1));
        const __m512i odd = _mm512_set1_epi16(((1 << Bits) - 1) << 8);
        return _mm512_or_si512(even, _mm512_and_si512(_mm512_slli_epi16(words, 8 - Bits), odd));
    }
    static void split(VB codes, VB* out) { out[0] = codes; }
};

#include "cpu/matrix/tier.h"

}  // namespace

const MatrixKernels& matrix_kernels_avx512() { return kTable; }

}  // namespace moestream
