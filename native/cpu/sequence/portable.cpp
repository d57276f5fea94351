// Portable tier: four-float vectors of the compiler (SSE2 on x86-64, plain code elsewhere), half floats in software.
#include <cstring>

#include "cpu/sequence/kernels.h"

namespace moestream {
namespace {

using Vec = float __attribute__((vector_size(16)));
using IntVec = uint32_t __attribute__((vector_size(16)));

constexpr int kLanes = 4;
constexpr int kTileRows = 4;
constexpr int kTileCols = 2;
constexpr int kDots = 8;
constexpr int kValueRows = 4;
constexpr int kStateCols = 4;

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// IEEE binary16 -> binary32: shift the fields into place, then scale by 2^112, which also makes denormals normal.
inline float half_to_float(uint16_t h) {
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    if (magnitude >= 0x0f800000) return from_bits(sign | (magnitude + 0x70000000));  // Inf, NaN
    return from_bits(sign | to_bits(from_bits(magnitude) * from_bits(0x77800000)));
}

// binary32 -> binary16, nearest even.
inline uint16_t float_to_half(float x) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // denormal: adding 0.5 leaves the rounded mantissa in the low bits
        half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    } else {
        half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
}

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec load_half(const uint16_t* p) {
    return Vec{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
inline void store_half(uint16_t* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
}
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
inline bool any_greater(Vec a, Vec b) {
    const IntVec m = (IntVec)(a > b);
    return (m[0] | m[1] | m[2] | m[3]) != 0;
}
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float largest(Vec v) {
    float m = v[0];
    for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
    return m;
}

// Lane i of the result is the sum of rows[i].
inline Vec sums(const Vec* rows) { return Vec{sum(rows[0]), sum(rows[1]), sum(rows[2]), sum(rows[3])}; }

inline void transpose(Vec* rows) {
    const Vec a = rows[0], b = rows[1], c = rows[2], d = rows[3];
    for (int i = 0; i < kLanes; ++i) rows[i] = Vec{a[i], b[i], c[i], d[i]};
}

}  // namespace
}  // namespace moestream

#include "cpu/sequence/body.h"

namespace moestream {
const SequenceKernels kSequencePortable = kTable;
}
