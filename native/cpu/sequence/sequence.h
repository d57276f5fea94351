// Operators on sequences, on all compute threads. Results do not depend on the number of threads: work is cut by shape
// only, and every sum has a fixed order. Shapes are the caller's duty (bind/sequence.cpp checks them).
#pragma once
#include <cstdint>

#include "cpu/sequence/kernels.h"

namespace moestream {

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* y);
// y += x
void add(const float* x, int64_t count, float* y);
void route(const float* logits, int64_t rows, int64_t experts, int64_t k, bool renormalise, int32_t* ids,
           float* weights);

// shared and gate may be null.
void combine(const float* x, const float* expert_out, const float* weights, const float* shared, const float* gate,
             int64_t rows, int64_t k, int64_t width, float* out);
void attention(const AttentionArgs& args);

// Fills the segment fields of args itself.
void delta_net(DeltaNetArgs args);

// 64-byte aligned memory of this thread, at least n floats; valid until the next call with the same slot.
float* thread_scratch(int slot, int64_t n);

}  // namespace moestream
