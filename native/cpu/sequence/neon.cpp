// NEON tier (64-bit ARM).
#include <arm_neon.h>

#include "cpu/sequence/kernels.h"

namespace moestream {
namespace {

using Vec = float32x4_t;
using IntVec = uint32x4_t;

constexpr int kLanes = 4;
constexpr int kTileRows = 6;  // 6 x 4 accumulators leave 8 of the 32 registers
constexpr int kTileCols = 4;
constexpr int kDots = 16;
constexpr int kValueRows = 4;
constexpr int kStateCols = 8;

inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
inline Vec load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store_half(uint16_t* p, Vec v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
inline Vec broadcast(float x) { return vdupq_n_f32(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec maximum(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec minimum(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline bool any_greater(Vec a, Vec b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }
inline float sum(Vec v) { return vaddvq_f32(v); }
inline float largest(Vec v) { return vmaxnmvq_f32(v); }

// Lane i of the result is the sum of rows[i].
inline Vec sums(const Vec* rows) { return vpaddq_f32(vpaddq_f32(rows[0], rows[1]), vpaddq_f32(rows[2], rows[3])); }

inline void transpose(Vec* rows) {
    const float32x4x2_t a = vtrnq_f32(rows[0], rows[1]), b = vtrnq_f32(rows[2], rows[3]);
    rows[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    rows[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    rows[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    rows[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

}  // namespace
}  // namespace moestream

#include "cpu/sequence/body.h"

namespace moestream {
const SequenceKernels kSequenceNeon = kTable;
}
