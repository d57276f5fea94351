#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/pool.h"
#include "cpu/sequence/sequence.h"

namespace moestream {
namespace {

// With few row blocks (decode) the context is split until there are about this many units, but no unit is smaller
// than kSplitKeys. Both are constants so that results do not depend on the machine.
constexpr int64_t kUnits = 32;
constexpr int64_t kSplitKeys = 256;

// How the work of one call is cut: kv_heads x blocks of query rows x splits of the context.
struct Cut {
    int64_t rows;  // T * G
    int64_t blocks;
    int64_t splits;
    int64_t split_keys;

    explicit Cut(const AttentionArgs& args) {
        rows = args.tokens * args.group();
        blocks = (rows + kRowBlock - 1) / kRowBlock;
        const int64_t keys = args.past + args.tokens;
        const int64_t wanted = std::max<int64_t>(1, kUnits / (args.kv_heads * blocks));
        const int64_t share = (keys + wanted - 1) / wanted;
        split_keys = std::max(kSplitKeys, (share + kKeyBlock - 1) / kKeyBlock * kKeyBlock);
        splits = (keys + split_keys - 1) / split_keys;
    }
};

}  // namespace

void attention(const AttentionArgs& args) {
    if (args.tokens == 0) return;
    const SequenceKernels& kernels = sequence_kernels();
    const Cut cut(args);
    const int64_t scratch = attention_scratch_floats(args.head_dim);
    const int64_t partial = partial_floats(std::min(kRowBlock, cut.rows), args.head_dim);
    const int64_t groups = args.kv_heads * cut.blocks;

    pool().parallel_for(args.tokens, 8, [&](int64_t t0, int64_t t1) { kernels.attention_prepare(args, t0, t1); });
    // Several splits meet in shared memory and whoever ends last joins them; a single one stays with its thread.
    float* shared = cut.splits > 1 ? thread_scratch(1, groups * cut.splits * partial) : nullptr;
    std::vector<std::atomic<int64_t>> left(cut.splits > 1 ? groups : 0);
    for (auto& count : left) count.store(cut.splits, std::memory_order_relaxed);

    pool().parallel_for(groups * cut.splits, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t group = i / cut.splits, split = i % cut.splits;
            const int64_t block = cut.blocks - 1 - group / args.kv_heads;  // the longest first
            AttentionUnit unit;
            unit.kv_head = group % args.kv_heads;
            unit.row0 = block * kRowBlock;
            unit.row1 = std::min(cut.rows, unit.row0 + kRowBlock);
            unit.key0 = split * cut.split_keys;
            unit.key1 = std::min(args.past + args.tokens, unit.key0 + cut.split_keys);
            float* own = thread_scratch(0, scratch + partial);
            if (cut.splits == 1) {
                kernels.attention_partial(args, unit, own, own + scratch);
                kernels.attention_finish(args, unit, own + scratch, 1);
                continue;
            }
            const int64_t size = partial_floats(unit.rows(), args.head_dim);
            float* joint = shared + group * cut.splits * partial;
            kernels.attention_partial(args, unit, own, joint + split * size);
            if (left[group].fetch_sub(1, std::memory_order_acq_rel) == 1)
                kernels.attention_finish(args, unit, joint, cut.splits);
        }
    });
}

}  // namespace moestream
