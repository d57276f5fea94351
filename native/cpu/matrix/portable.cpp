// Plain C++ for any machine: the tier every other one is compared with.
#include "cpu/matrix/kernels.h"

namespace moestream {
namespace {

constexpr int kLanes = 4;
constexpr int kVectorRows = 4;  // matrix rows a vector product with several activation rows works on at once
constexpr int kTileRows = 4;
constexpr int affine_together(int) { return kVectorRows; }  // matrix rows an affine vector product works on at once

struct VF {
    float v[kLanes];
};
struct VI {
    int32_t v[kLanes];
};
struct VB {
    uint8_t v[4 * kLanes];
};

template <class F>
inline VF each(F&& f) {
    VF out;
    for (int l = 0; l < kLanes; ++l) out.v[l] = f(l);
    return out;
}
template <class F>
inline VI each_i(F&& f) {
    VI out;
    for (int l = 0; l < kLanes; ++l) out.v[l] = f(l);
    return out;
}

template <class T>
inline T load_as(const void* p, int n) {
    T out{};
    __builtin_memcpy(&out, p, static_cast<std::size_t>(n));
    return out;
}

inline VF zero_f() { return {}; }
inline VI zero_i() { return {}; }
inline VB zero_b() { return {}; }
inline VF set_f(float v) { return {v, v, v, v}; }
inline VF load_f(const float* p) { return load_as<VF>(p, sizeof(VF)); }
inline VF load_f_n(const float* p, int n) { return n <= 0 ? zero_f() : load_as<VF>(p, (n < kLanes ? n : kLanes) * 4); }
inline void store_f(float* p, VF v) { __builtin_memcpy(p, &v, sizeof(VF)); }
inline void store_f_n(float* p, VF v, int n) {
    for (int l = 0; l < kLanes && l < n; ++l) p[l] = v.v[l];
}
inline VB load_b(const void* p) { return load_as<VB>(p, sizeof(VB)); }
inline void store_b(void* p, VB v) { __builtin_memcpy(p, &v, sizeof(VB)); }
inline void store_i8(int8_t* p, VI v) {
    for (int l = 0; l < kLanes; ++l) p[l] = static_cast<int8_t>(v.v[l] > 127 ? 127 : v.v[l] < -128 ? -128 : v.v[l]);
}
inline VI as_i(VB v) { return load_as<VI>(&v, sizeof(VI)); }

inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float half_to_float(uint32_t h) {
    const uint32_t sign = (h & 0x8000U) << 16;
    const uint32_t exponent = h >> 10 & 31;
    const uint32_t fraction = h & 1023;
    if (exponent == 31) return from_bits(sign | 0x7F800000U | fraction << 13);
    if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * 0x1p-24F;  // subnormal
    return sign != 0 ? -small : small;
}

struct Shorts {
    uint16_t v[kLanes];
};
inline VF load_bf16_n(const uint8_t* p, int n) {
    const auto s = load_as<Shorts>(p, n * 2);
    return each([&](int l) { return from_bits(static_cast<uint32_t>(s.v[l]) << 16); });
}
inline VF load_f16_n(const uint8_t* p, int n) {
    const auto s = load_as<Shorts>(p, n * 2);
    return each([&](int l) { return half_to_float(s.v[l]); });
}
inline VF load_f32_n(const uint8_t* p, int n) { return load_as<VF>(p, n * 4); }
inline VF load_bf16(const uint8_t* p) { return load_bf16_n(p, kLanes); }
inline VF load_f16(const uint8_t* p) { return load_f16_n(p, kLanes); }
inline VF load_f32(const uint8_t* p) { return load_f32_n(p, kLanes); }

inline VF add_f(VF a, VF b) {
    return each([&](int l) { return a.v[l] + b.v[l]; });
}
inline VF sub_f(VF a, VF b) {
    return each([&](int l) { return a.v[l] - b.v[l]; });
}
inline VF mul_f(VF a, VF b) {
    return each([&](int l) { return a.v[l] * b.v[l]; });
}
inline VF div_f(VF a, VF b) {
    return each([&](int l) { return a.v[l] / b.v[l]; });
}
inline VF max_f(VF a, VF b) {
    return each([&](int l) { return a.v[l] > b.v[l] ? a.v[l] : b.v[l]; });
}
inline VF min_f(VF a, VF b) {
    return each([&](int l) { return a.v[l] < b.v[l] ? a.v[l] : b.v[l]; });
}
inline VF abs_f(VF a) {
    return each([&](int l) { return __builtin_fabsf(a.v[l]); });
}
// Two roundings: a fused one is a slow library call where the machine has no instruction for it.
inline VF fma_f(VF a, VF b, VF c) {
    return each([&](int l) { return a.v[l] * b.v[l] + c.v[l]; });
}
inline float sum_f(VF a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
inline float first_f(VF a) { return a.v[0]; }
inline float max_of(VF a) {
    float top = a.v[0];
    for (int l = 1; l < kLanes; ++l) top = a.v[l] > top ? a.v[l] : top;
    return top;
}
inline VI add_i(VI a, VI b) {
    return each_i(
        [&](int l) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) + static_cast<uint32_t>(b.v[l])); });
}
inline int32_t sum_i(VI a) { return add_i(add_i({a.v[0]}, {a.v[1]}), add_i({a.v[2]}, {a.v[3]})).v[0]; }
inline VF to_float(VI a) {
    return each([&](int l) { return static_cast<float>(a.v[l]); });
}
// To nearest, ties to even: adding 1.5 * 2^23 leaves no fraction bits. For |v| < 2^22.
inline VI round_i(VF a) {
    return each_i([&](int l) {
        const float shifted = a.v[l] + 12582912.0F;
        return __builtin_bit_cast(int32_t, shifted) - 0x4B400000;
    });
}
inline VF scale_by_power(VF a, VI n) {
    return each([&](int l) { return a.v[l] * from_bits(static_cast<uint32_t>(n.v[l] + 127) << 23); });
}
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
inline void prefetch_far(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
inline VB opaque(VB v) {
    asm volatile("" : "+m"(v));
    return v;
}

template <bool Wide>
inline VI dot(VI acc, VB codes, VB values) {
    for (int l = 0; l < kLanes; ++l)
        for (int m = 0; m < 4; ++m)
            acc.v[l] += static_cast<int32_t>(codes.v[4 * l + m]) * static_cast<int8_t>(values.v[4 * l + m]);
    return acc;
}

inline VB broadcast_word(const int8_t* p) {
    VB out;
    for (int l = 0; l < kLanes; ++l) __builtin_memcpy(out.v + 4 * l, p, 4);
    return out;
}

inline void expand(VB codes, VF* out) {
    for (int m = 0; m < 4; ++m) out[m] = each([&](int l) { return static_cast<float>(codes.v[4 * l + m]); });
}

// Counts lanes over the steps of a block; lane l of step u belongs to group (u * kLanes + l) >> shift.
using Counter = int;
inline Counter first_step() { return 0; }
inline Counter next_step(Counter c) { return c + kLanes; }
// Every lane's value of the block whose groups are v's lanes.
inline VF spread(VF v, Counter c, int shift) {
    return each([&](int l) { return v.v[(c + l) >> shift]; });
}

inline void transpose_b(VB* v) {
    VB out[kLanes];
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < kLanes; ++j) __builtin_memcpy(out[j].v + 4 * i, v[i].v + 4 * j, 4);
    for (int i = 0; i < kLanes; ++i) v[i] = out[i];
}

inline void transpose_f(VF* v) {
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < i; ++j) {
            const float t = v[i].v[j];
            v[i].v[j] = v[j].v[i];
            v[j].v[i] = t;
        }
}

template <int Bits>
struct Codes {
    static constexpr int kVectors = 1;
    static constexpr int kColumns = 16;
    static constexpr int kBytes = 2 * Bits;
    static VB load(const uint8_t* p) {
        VB out;
        for (int half = 0; half < 2; ++half) {
            uint64_t word = 0;
            __builtin_memcpy(&word, p + half * Bits, Bits);
            for (int i = 0; i < 8; ++i)
                out.v[8 * half + i] = static_cast<uint8_t>((word >> (Bits * i)) & ((1U << Bits) - 1));
        }
        return out;
    }
    static VB load_n(const uint8_t* p, int n) { return load(load_as<VB>(p, n).v); }
    static void split(VB codes, VB* out) { out[0] = codes; }
};

template <>
struct Codes<4> {
    static constexpr int kVectors = 2;
    static constexpr int kColumns = 32;
    static constexpr int kBytes = 16;
    static VB load(const uint8_t* p) { return load_b(p); }
    static VB load_n(const uint8_t* p, int n) { return load_as<VB>(p, n); }
    static void split(VB packed, VB* out) {
        for (int i = 0; i < 4 * kLanes; ++i) {
            out[0].v[i] = packed.v[i] & 15;
            out[1].v[i] = packed.v[i] >> 4;
        }
    }
};

#include "cpu/matrix/tier.h"

}  // namespace

const MatrixKernels& matrix_kernels_portable() { return kTable; }

}  // namespace moestream
