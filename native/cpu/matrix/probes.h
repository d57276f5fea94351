// Ceilings of this machine with the current pool and tier, measured in a moment; benchmarks print them first.
#pragma once
#include <cstdint>

namespace moestream {

// Bytes per second of a streaming sum over `nbytes` of fresh memory, the median of passes for about `seconds`.
double memory_bandwidth(int64_t nbytes, double seconds);

// Operations per second (a multiply and an add are two) of the tier's int8 dot product and float32 FMA.
double int8_peak(double seconds);
double fma_peak(double seconds);

}  // namespace moestream
