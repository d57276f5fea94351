#include <algorithm>

#include "cpu/pool.h"
#include "cpu/sequence/sequence.h"

namespace moestream {
namespace {

// From this many tokens on, the chunked form is faster.
constexpr int64_t kChunkedTokens = 4;

}  // namespace

void delta_net(DeltaNetArgs args) {
    const SequenceKernels& kernels = sequence_kernels();
    args.chunked = args.tokens >= kChunkedTokens;
    const int64_t keys = args.key_heads * kSegment * args.key_dim, gates = kSegment * args.value_heads;
    const int64_t products = args.chunked ? args.key_heads * kSegment * kChunk : 0;
    const int64_t values = args.value_heads * kSegment * args.value_dim;
    args.q = thread_scratch(1, 2 * keys + values + 2 * gates + 2 * products);
    args.k = args.q + keys;
    args.v = args.k + keys;
    args.g = args.v + values;
    args.beta = args.g + gates;
    args.kk = args.beta + gates;
    args.qk = args.kk + products;
    const int64_t scratch = delta_scratch_floats(args.key_dim, args.value_dim, args.width);
    const int64_t units = args.key_heads + args.value_heads + 1;
    for (args.begin = 0; args.begin < args.tokens; args.begin += args.count) {
        args.count = std::min(kSegment, args.tokens - args.begin);
        // One token's convolution is short: few tasks. A head's state is 64 KB: one task each.
        pool().parallel_for(units, args.count < 4 ? 16 : 1, [&](int64_t begin, int64_t end) {
            for (int64_t unit = begin; unit < end; ++unit)
                kernels.delta_prepare(args, unit, thread_scratch(0, scratch));
        });
        pool().parallel_for(args.value_heads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t head = begin; head < end; ++head) kernels.delta_head(args, head, thread_scratch(0, scratch));
        });
    }
}

}  // namespace moestream
