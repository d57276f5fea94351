// Matrix products spread over the pool: one input times several matrices, gated feed-forward blocks, routed experts.
#pragma once
#include <cstdint>

#include "cpu/matrix/input.h"
#include "cpu/matrix/kernels.h"

namespace moestream {

struct Target {
    const MatrixView* matrix;
    float* out;  // [T, N]
};

// out = x W^T for every target, in one parallel region. Thread rule of Input.
void linear(Input& x, const Target* targets, int count);

// One gated feed-forward block and the rows it serves.
struct Block {
    MatrixView gate, up, down;
    const int32_t* x_rows;    // [count] rows of x; null: 0 .. count - 1
    const int32_t* out_rows;  // [count] rows of out; null: 0 .. count - 1
    int count;
};

// out[out_rows[i]] = down(silu(gate x) * up x) for every block; all blocks have the same layouts. The work is handed
// out by (block, rows of a matrix), and a row's result depends only on its input, its block and the block's count.
void gated_blocks(Input& x, const Block* blocks, int count, float* out, int64_t out_stride);

// out[i] = row ids[i] of an encoded table, as float32.
void embed(const MatrixView& table, const int32_t* ids, int64_t count, float* out);

}  // namespace moestream
