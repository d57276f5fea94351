// NEON with dot product and half precision (Armv8.2 and later; every Apple Silicon and Graviton 2+).
#include <arm_neon.h>

#include "cpu/matrix/kernels.h"

namespace moestream {
namespace {

using VF = float32x4_t;
using VI = int32x4_t;
using VB = uint8x16_t;

constexpr int kLanes = 4;
constexpr int kVectorRows = 4;  // matrix rows a vector product with several activation rows works on at once
constexpr int kTileRows = 8;    // activation rows a tile product works on at once
constexpr int affine_together(int) { return kVectorRows; }  // matrix rows an affine vector product works on at once

inline VF zero_f() { return vdupq_n_f32(0); }
inline VI zero_i() { return vdupq_n_s32(0); }
inline VB zero_b() { return vdupq_n_u8(0); }
inline VF set_f(float v) { return vdupq_n_f32(v); }
inline VF load_f(const float* p) { return vld1q_f32(p); }
inline VF load_f_n(const float* p, int n) {
    float v[kLanes] = {};
    if (n > 0) __builtin_memcpy(v, p, static_cast<std::size_t>(n < kLanes ? n : kLanes) * 4);
    return vld1q_f32(v);
}
inline void store_f(float* p, VF v) { vst1q_f32(p, v); }
inline void store_f_n(float* p, VF v, int n) {
    if (n >= kLanes) return vst1q_f32(p, v);
    float out[kLanes];
    vst1q_f32(out, v);
    if (n > 0) __builtin_memcpy(p, out, static_cast<std::size_t>(n) * 4);
}
inline VB load_b(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
inline VB load_b_n(const uint8_t* p, int n) {
    uint8_t v[16] = {};
    __builtin_memcpy(v, p, static_cast<std::size_t>(n));
    return vld1q_u8(v);
}
inline void store_b(void* p, VB v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
inline void store_i8(int8_t* p, VI v) {
    const int16x4_t words = vqmovn_s32(v);
    int8_t out[8];
    vst1_s8(out, vqmovn_s16(vcombine_s16(words, words)));
    __builtin_memcpy(p, out, 4);
}
inline VI as_i(VB v) { return vreinterpretq_s32_u8(v); }

// Parts have any alignment, so wider elements are read as bytes.
inline VF widen_bf16(uint8x8_t v) { return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(v), 16)); }
inline VF widen_f16(uint8x8_t v) { return vcvt_f32_f16(vreinterpret_f16_u8(v)); }
inline VF load_bf16(const uint8_t* p) { return widen_bf16(vld1_u8(p)); }
inline VF load_bf16_n(const uint8_t* p, int n) { return widen_bf16(vget_low_u8(load_b_n(p, 2 * n))); }
inline VF load_f16(const uint8_t* p) { return widen_f16(vld1_u8(p)); }
inline VF load_f16_n(const uint8_t* p, int n) { return widen_f16(vget_low_u8(load_b_n(p, 2 * n))); }
inline VF load_f32(const uint8_t* p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
inline VF load_f32_n(const uint8_t* p, int n) { return vreinterpretq_f32_u8(load_b_n(p, 4 * n)); }

inline VF add_f(VF a, VF b) { return vaddq_f32(a, b); }
inline VF sub_f(VF a, VF b) { return vsubq_f32(a, b); }
inline VF mul_f(VF a, VF b) { return vmulq_f32(a, b); }
inline VF div_f(VF a, VF b) { return vdivq_f32(a, b); }
inline VF max_f(VF a, VF b) { return vmaxq_f32(a, b); }
inline VF min_f(VF a, VF b) { return vminq_f32(a, b); }
inline VF abs_f(VF a) { return vabsq_f32(a); }
inline VF fma_f(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
inline VF scale_by_power(VF a, VI n) {
    return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)));
}
inline float sum_f(VF v) { return vaddvq_f32(v); }
inline float max_of(VF v) { return vmaxvq_f32(v); }
inline float first_f(VF v) { return vgetq_lane_f32(v, 0); }
inline VI add_i(VI a, VI b) { return vaddq_s32(a, b); }
inline int32_t sum_i(VI v) { return vaddvq_s32(v); }
inline VF to_float(VI v) { return vcvtq_f32_s32(v); }
inline VI round_i(VF v) { return vcvtnq_s32_f32(v); }
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
inline void prefetch_far(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
inline VB opaque(VB v) {
    asm volatile("" : "+w"(v));
    return v;
}

// acc[lane] += sum of four unsigned codes times four signed values. The instruction multiplies signed by signed, so
// codes of 8 bits go as code - 128, and 2 * 64 * value is added back.
template <bool Wide>
inline VI dot(VI acc, VB codes, VB values) {
    const int8x16_t x = vreinterpretq_s8_u8(values);
    if constexpr (!Wide) return vdotq_s32(acc, vreinterpretq_s8_u8(codes), x);
    const int8x16_t half = vdupq_n_s8(64);
    acc = vdotq_s32(acc, vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))), x);
    return vdotq_s32(vdotq_s32(acc, half, x), half, x);
}

inline VB broadcast_word(const int8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(word));
}

// Byte m of every lane as a float.
inline void expand(VB codes, VF* out) {
    const uint32x4_t words = vreinterpretq_u32_u8(codes);
    const uint32x4_t byte = vdupq_n_u32(255);
    out[0] = vcvtq_f32_u32(vandq_u32(words, byte));
    out[1] = vcvtq_f32_u32(vandq_u32(vshrq_n_u32(words, 8), byte));
    out[2] = vcvtq_f32_u32(vandq_u32(vshrq_n_u32(words, 16), byte));
    out[3] = vcvtq_f32_u32(vshrq_n_u32(words, 24));
}

// Counts lanes over the steps of a block; lane l of step u belongs to group (u * kLanes + l) >> shift. A step is at
// most 32 columns here, so all its lanes belong to one group.
using Counter = int;
inline Counter first_step() { return 0; }
inline Counter next_step(Counter c) { return c + kLanes; }
// Every lane's value of the block whose groups are v's lanes.
inline VF spread(VF v, Counter c, int shift) {
    float lanes[kLanes];
    vst1q_f32(lanes, v);
    return vdupq_n_f32(lanes[c >> shift]);
}

inline void transpose_f(VF* v) {
    const float32x4_t a = vtrn1q_f32(v[0], v[1]);
    const float32x4_t b = vtrn2q_f32(v[0], v[1]);
    const float32x4_t c = vtrn1q_f32(v[2], v[3]);
    const float32x4_t d = vtrn2q_f32(v[2], v[3]);
    v[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    v[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    v[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    v[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

inline void transpose_b(VB* v) {
    VF words[kLanes];
    for (int i = 0; i < kLanes; ++i) words[i] = vreinterpretq_f32_u8(v[i]);
    transpose_f(words);
    for (int i = 0; i < kLanes; ++i) v[i] = vreinterpretq_u8_f32(words[i]);
}

// Codes of one step of a matrix row. load reads kBytes; load_n fewer, giving zeros for the rest.
// 2, 3 and 6 bits: eight codes are Bits bytes, shifted apart in a general register.
template <int Bits>
struct Codes {
    static constexpr int kVectors = 1;
    static constexpr int kColumns = 16;
    static constexpr int kBytes = 2 * Bits;
    static VB load(const uint8_t* p) { return vcombine_u8(eight(p), eight(p + Bits)); }
    static VB load_n(const uint8_t* p, int n) {
        uint8_t padded[kBytes] = {};
        __builtin_memcpy(padded, p, static_cast<std::size_t>(n));
        return load(padded);
    }
    static void split(VB codes, VB* out) { out[0] = codes; }

private:
    static uint8x8_t eight(const uint8_t* p) {
        uint64_t packed = 0;
        __builtin_memcpy(&packed, p, Bits);
        uint64_t codes = 0;
        for (int i = 0; i < 8; ++i) codes |= (packed >> (Bits * i) & ((1U << Bits) - 1)) << (8 * i);
        return vcreate_u8(codes);
    }
};

template <>
struct Codes<4> {
    static constexpr int kVectors = 2;  // even columns, odd columns
    static constexpr int kColumns = 32;
    static constexpr int kBytes = 16;
    static VB load(const uint8_t* p) { return vld1q_u8(p); }
    static VB load_n(const uint8_t* p, int n) { return load_b_n(p, n); }
    static void split(VB packed, VB* out) {
        out[0] = vandq_u8(packed, vdupq_n_u8(15));
        out[1] = vshrq_n_u8(packed, 4);
    }
};

template <>
struct Codes<8> {
    static constexpr int kVectors = 1;
    static constexpr int kColumns = 16;
    static constexpr int kBytes = 16;
    static VB load(const uint8_t* p) { return vld1q_u8(p); }
    static VB load_n(const uint8_t* p, int n) { return load_b_n(p, n); }
    static void split(VB codes, VB* out) { out[0] = codes; }
};

#include "cpu/matrix/tier.h"

}  // namespace

const MatrixKernels& matrix_kernels_neon() { return kTable; }

}  // namespace moestream
