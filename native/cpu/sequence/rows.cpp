#include "cpu/pool.h"
#include "cpu/sequence/sequence.h"

namespace moestream {
namespace {

// Below about this many floats a task is done before another thread wakes up.
constexpr int64_t kTaskFloats = 1 << 15;

int64_t rows_per_task(int64_t row_floats) { return row_floats >= kTaskFloats ? 1 : kTaskFloats / (row_floats + 1) + 1; }

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* y) {
    const SequenceKernels& kernels = sequence_kernels();
    pool().parallel_for(rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
        kernels.rms_norm(x + begin * width, weight, eps, end - begin, width, y + begin * width);
    });
}

void add(const float* x, int64_t count, float* y) {
    pool().parallel_for(count, kTaskFloats, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) y[i] += x[i];
    });
}

void route(const float* logits, int64_t rows, int64_t experts, int64_t k, bool renormalise, int32_t* ids,
           float* weights) {
    const SequenceKernels& kernels = sequence_kernels();
    pool().parallel_for(rows, rows_per_task(8 * experts), [&](int64_t begin, int64_t end) {
        kernels.route(logits + begin * experts, end - begin, experts, k, renormalise, ids + begin * k,
                      weights + begin * k);
    });
}

void combine(const float* x, const float* expert_out, const float* weights, const float* shared, const float* gate,
             int64_t rows, int64_t k, int64_t width, float* out) {
    const SequenceKernels& kernels = sequence_kernels();
    pool().parallel_for(rows, rows_per_task((k + 2) * width), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            kernels.combine(x + r * width, expert_out + r * k * width, weights + r * k,
                            shared ? shared + r * width : nullptr, gate ? gate + r : nullptr, k, width,
                            out + r * width);
    });
}

}  // namespace moestream
