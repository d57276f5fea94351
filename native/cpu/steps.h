// What a layer does to one new token of each of several sequences, in one call: its parts take microseconds each, and
// going back to Python between them took as long.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/matrix/input.h"
#include "cpu/matrix/kernels.h"
#include "cpu/sequence/kernels.h"

namespace moestream {

// out = x + o(attention(qkv(norm(x)))), x and out [T, H]. Each of `sequences` has what is the same in every call, one
// token, its cache and its own cos and sin; the rest is filled in.
struct AttentionStep {
    const float* norm;  // [H]
    MatrixView q, k, v, o;

    void run(const float* x, std::vector<AttentionArgs>& sequences, bool exact, float* out) const;
};

// out = x + out_proj(delta_net(projections(norm(x)))); likewise.
struct DeltaNetStep {
    const float* norm;  // [H]
    MatrixView u, z, b, a, out_proj;

    void run(const float* x, std::vector<DeltaNetArgs>& sequences, bool exact, float* out) const;
};

// Norm, router and top-k of T rows: what a layer's experts need to start. gate may be null, with shared_gate null.
struct RouteStep {
    const float* norm;  // [H]
    float eps;
    MatrixView router;
    const MatrixView* shared_gate;
    bool renormalise;

    void run(const float* x, int64_t rows, int64_t k, bool exact, float* normed, int32_t* ids, float* weights,
             float* gate) const;
};

}  // namespace moestream
