// Norm, routing and the sum over experts (see body.h for how this file is used).
#pragma once
#include "cpu/sequence/vector_math.h"

namespace moestream {
namespace {

inline float inverse_rms(const float* x, int64_t width, float eps) {
    return 1.0f / __builtin_sqrtf(dot(x, x, width) / static_cast<float>(width) + eps);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* y) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        const Vec scale = broadcast(inverse_rms(x, width, eps));
        for (int64_t i = 0; i < width; i += kLanes)
            store_row(y, i, width, load_row(x, i, width) * scale * load_row(weight, i, width));
    }
}

// Keeps (value, id) lists sorted by descending value; equal values stay in the order of insertion.
struct Leaders {
    float* values;
    int32_t* ids;
    int64_t count;

    void insert(float value, int32_t id, int64_t capacity) {
        int64_t at = count < capacity ? count++ : capacity - 1;
        for (; at > 0 && value > values[at - 1]; --at) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = value;
        ids[at] = id;
    }
};

void route(const float* logits, int64_t rows, int64_t experts, int64_t k, bool renormalise, int32_t* ids,
           float* weights) {
    for (int64_t r = 0; r < rows; ++r, logits += experts, ids += k, weights += k) {
        Leaders leaders{weights, ids, 0};
        // NaN ranks last but is still a valid id; it reaches the weights through the sum below.
        auto ranked = [&](int64_t e) { return logits[e] == logits[e] ? logits[e] : -__builtin_inff(); };
        int64_t e = 0;
        for (; e < k; ++e) leaders.insert(ranked(e), static_cast<int32_t>(e), k);
        while (e < experts) {
            const bool whole = e + kLanes <= experts;
            const int64_t end = whole ? e + kLanes : experts;
            if (!whole || any_greater(load(logits + e), broadcast(weights[k - 1])))
                for (int64_t i = e; i < end; ++i)
                    if (logits[i] > weights[k - 1]) leaders.insert(logits[i], static_cast<int32_t>(i), k);
            e = end;
        }
        const Vec top = broadcast(weights[0]);
        Vec partial = zero();
        for (e = 0; e + kLanes <= experts; e += kLanes) partial = partial + exponential(load(logits + e) - top);
        float total = sum(partial);
        for (; e < experts; ++e) total += exponential(broadcast(logits[e]) - top)[0];
        float chosen = 0;
        for (int64_t j = 0; j < k; ++j) {
            weights[j] = exponential(broadcast(weights[j]) - top)[0] / total;
            chosen += weights[j];
        }
        if (renormalise)
            for (int64_t j = 0; j < k; ++j) weights[j] /= chosen;
    }
}

void combine(const float* x, const float* expert_out, const float* weights, const float* shared, const float* gate,
             int64_t k, int64_t width, float* out) {
    const Vec scale = gate ? sigmoid(broadcast(*gate)) : broadcast(1.0f);
    for (int64_t i = 0; i < width; i += kLanes) {
        Vec acc = load_row(x, i, width);
        for (int64_t j = 0; j < k; ++j)
            acc = fma(broadcast(weights[j]), load_row(expert_out + j * width, i, width), acc);
        if (shared) acc = fma(scale, load_row(shared, i, width), acc);
        store_row(out, i, width, acc);
    }
}

}  // namespace
}  // namespace moestream
