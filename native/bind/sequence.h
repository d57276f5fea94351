// What the operators on sequences and the steps made of them check alike.
#pragma once
#include <cstdint>

#include "bind/shapes.h"
#include "cpu/sequence/kernels.h"

namespace moestream {

// What stays the same in every call of a layer; throws nanobind::value_error naming what does not fit.
AttentionArgs attention_constants(const In& q_norm, const In& k_norm, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                  int64_t rotary_dim, bool gated, float eps);
DeltaNetArgs delta_net_constants(const In& conv, const In& neg_exp_a, const In& dt_bias, const In& norm,
                                 int64_t key_heads, int64_t value_heads, int64_t key_dim, int64_t value_dim, float eps);

// The cache or state of one sequence, for args whose constants and tokens are set.
void use_cache(const OutAny& cache_k, const OutAny& cache_v, int64_t length, AttentionArgs& args);
void use_state(const Out& conv, const Out& s, DeltaNetArgs& args);

}  // namespace moestream
