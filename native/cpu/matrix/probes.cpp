#include "cpu/matrix/probes.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/matrix/input.h"
#include "cpu/pool.h"

namespace moestream {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

template <class Pass>
double median_seconds(double limit, Pass&& pass) {
    std::vector<double> times;
    const auto start = Clock::now();
    do {
        const auto before = Clock::now();
        pass();
        times.push_back(seconds_since(before));
    } while (times.size() < 3 || seconds_since(start) < limit);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

double peak(double seconds, double (*ops)(int64_t, float*)) {
    constexpr int64_t kRounds = 200'000;
    double per_member = 0;
    std::atomic<int> sink{0};
    const double time = median_seconds(seconds, [&] {
        pool().run([&](int member, int) {
            float result = 0;
            const double done = ops(kRounds, &result);
            if (member == 0) per_member = done;
            sink.fetch_add(static_cast<int>(result > 0), std::memory_order_relaxed);
        });
    });
    return per_member * pool().size() / time;
}

}  // namespace

double memory_bandwidth(int64_t nbytes, double seconds) {
    constexpr int64_t kPiece = 1 << 20;
    if (nbytes < kPiece) throw std::invalid_argument("memory_bandwidth needs at least 1 MiB");
    const int64_t pieces = nbytes / kPiece;
    Buffer<uint8_t> memory;
    uint8_t* data = memory.resize(pieces * kPiece);
    pool().parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
        std::memset(data + begin * kPiece, 1, static_cast<size_t>((end - begin) * kPiece));
    });
    const MatrixKernels& kernels = matrix_kernels();
    std::atomic<uint64_t> sink{0};
    const double time = median_seconds(seconds, [&] {
        pool().parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
            sink.fetch_add(kernels.stream_sum(data + begin * kPiece, (end - begin) * kPiece),
                           std::memory_order_relaxed);
        });
    });
    return static_cast<double>(pieces * kPiece) / time;
}

double int8_peak(double seconds) { return peak(seconds, matrix_kernels().int8_ops); }
double fma_peak(double seconds) { return peak(seconds, matrix_kernels().fma_ops); }

}  // namespace moestream
