// Vector helpers shared by the kernels (see body.h for how this file is used).
#pragma once
#include <cstring>

#include "cpu/sequence/kernels.h"

namespace moestream {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Half {
    uint16_t bits;
};
inline Vec load(const Half* p) { return load_half(&p->bits); }
inline void store(Half* p, Vec v) { store_half(&p->bits, v); }

// The n < kLanes elements that remain of a row; missing lanes are zero.
template <class T>
inline Vec load_part(const T* p, int64_t n) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}
template <class T>
inline void store_part(T* p, int64_t n, Vec v) {
    T lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, n * sizeof(T));
}

// Element i of a row of n: a whole vector, or what remains.
template <class T>
inline Vec load_row(const T* row, int64_t i, int64_t n) {
    return i + kLanes <= n ? load(row + i) : load_part(row + i, n - i);
}
template <class T>
inline void store_row(T* row, int64_t i, int64_t n, Vec v) {
    if (i + kLanes <= n)
        store(row + i, v);
    else
        store_part(row + i, n - i, v);
}

inline Vec zero() { return broadcast(0.0f); }

// e^x = 2^n e^r with n = round(x / ln 2) and a polynomial of degree 6 in r (Cephes); relative error below 2e-7. Exactly
// 0 below -87.7, never above 1.7e38; NaN stays NaN (the bounds come first because maximum and minimum return their
// second argument when either is NaN).
inline Vec exponential(Vec x) {
    const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = maximum(broadcast(-88.0f), minimum(broadcast(88.0f), x));
    const Vec shifted = fma(x, broadcast(1.44269504f), magic);
    const Vec n = shifted - magic;
    const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
    Vec p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r) + broadcast(1.0f);
    const IntVec power = ((IntVec)shifted << 23) + (IntVec)broadcast(1.0f);  // n = -127 gives 0
    return p * (Vec)power;
}

inline Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(-x)); }
inline Vec silu(Vec x) { return x / (broadcast(1.0f) + exponential(-x)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|); log1p(y) = 2 artanh(y / (2 + y)), where the argument is at most 1/3 and
// eight terms of the series are left with a relative error below 2e-8.
inline Vec softplus(Vec x) {
    const Vec y = exponential(x > zero() ? -x : x);
    const Vec s = y / (y + broadcast(2.0f)), s2 = s * s;
    Vec p = broadcast(2.0f / 15);
    p = fma(p, s2, broadcast(2.0f / 13));
    p = fma(p, s2, broadcast(2.0f / 11));
    p = fma(p, s2, broadcast(2.0f / 9));
    p = fma(p, s2, broadcast(2.0f / 7));
    p = fma(p, s2, broadcast(2.0f / 5));
    p = fma(p, s2, broadcast(2.0f / 3));
    p = fma(p, s2, broadcast(2.0f));
    return fma(p, s, x > zero() ? x : zero());
}

// sum(x * y) over n elements.
inline float dot(const float* x, const float* y, int64_t n) {
    Vec a = zero(), b = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        a = fma(load(x + i), load(y + i), a);
        b = fma(load(x + i + kLanes), load(y + i + kLanes), b);
    }
    for (; i < n; i += kLanes) a = fma(load_row(x, i, n), load_row(y, i, n), a);
    return sum(a + b);
}

}  // namespace
}  // namespace moestream
