#include "cpu/matrix/products.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/pool.h"

namespace moestream {
namespace {

constexpr int64_t kTileRows = 128;         // matrix rows of a work item with many activation rows
constexpr int64_t kItemBytes = 16 * 1024;  // bytes of a matrix a work item reads with few activation rows
constexpr int64_t kHiddenRows = 256;       // hidden columns of a work item with many activation rows
constexpr int64_t kHiddenChunk = 256;      // activation rows whose hidden values a thread holds at once

int64_t row_bytes(const MatrixLayout& m) {
    switch (m.kind) {
        case Kind::affine:
            return m.cols * m.bits / 8 + m.cols / m.group * (m.scale_kind == Kind::f32 ? 8 : 4);
        case Kind::f32:
            return m.cols * 4;
        default:
            return m.cols * 2;
    }
}

// Rows of a work item: few enough for an even spread, enough to be worth a hand-out.
int64_t item_rows(const MatrixLayout& m, int count) {
    if (count > kMaxVectorRows) return kTileRows;
    return std::clamp<int64_t>(kItemBytes / row_bytes(m) / 8 * 8, 8, 512);
}

// Hidden columns of a work item: whole groups of the hidden values, which it also rounds.
int64_t hidden_rows(const MatrixLayout& down, int count) {
    if (count > kMaxVectorRows) return kHiddenRows;
    return down.kind == Kind::affine ? std::max(down.group, 64) : 64;
}

int64_t items_of(int64_t rows, int64_t per_item) { return (rows + per_item - 1) / per_item; }

// Items of one product that are multiplied in one go. Few activation rows are bound by memory, which is read fastest in
// one stream; for many, the results of an item should stay in cache.
int64_t run_items(int count) { return count > kMaxVectorRows ? 1 : std::numeric_limits<int32_t>::max(); }

// Calls body(owner, first, last) for the items [begin, end), numbered within their owner (starts[i] <= item <
// starts[i + 1]), for at most most(owner) that follow each other.
template <class Most, class Body>
void for_each_run(const std::vector<int64_t>& starts, int64_t begin, int64_t end, Most&& most, Body&& body) {
    int64_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    while (begin < end) {
        while (begin >= starts[i + 1]) ++i;
        const int64_t last = std::min({end, starts[i + 1], begin + most(i)});
        body(i, begin - starts[i], last - starts[i]);
        begin = last;
    }
}

// The hidden values silu(gate x) * up x of all blocks, in the forms `down` needs.
struct Hidden {
    Form form;
    Buffer<float> values;
    Activations view;
    bool keep_values;

    void resize(int64_t rows, const MatrixLayout& down, bool exact) {
        const bool affine = down.kind == Kind::affine;
        keep_values = exact || !affine;
        float* kept = keep_values ? values.resize(rows * down.cols) : nullptr;
        if (affine) form.resize(rows, down.cols, down.group, exact);
        view = affine ? form.view() : Activations{};
        view.values = kept;
        view.value_stride = down.cols;
    }
};

// Hidden columns [begin, end) of one block, activation rows [first, first + count).
void hidden_item(const MatrixKernels& kernels, const Block& block, const Activations& gate_x, const Activations& up_x,
                 bool exact, int64_t begin, int64_t end, int64_t hidden_row, const MatrixView* next, int64_t next_row,
                 Hidden& hidden) {
    thread_local Buffer<float> scratch;
    const int64_t width = end - begin;
    const int64_t chunk = std::min<int64_t>(block.count, kHiddenChunk);
    float* gate = scratch.resize(2 * chunk * width);
    float* up = gate + chunk * width;
    // A block's rows are cut the same way whatever else runs, so the choice of kernel depends on its count alone.
    const int64_t chunks = items_of(block.count, kHiddenChunk);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t first = block.count * c / chunks;
        const int count = static_cast<int>(block.count * (c + 1) / chunks - first);
        Product job{&block.gate, begin, end,       &gate_x, block.x_rows + first, count, gate, width, nullptr,
                    exact,       end,   &block.up, begin};
        kernels.multiply(job);
        job.matrix = &block.up;
        job.x = &up_x;
        job.out = up;
        job.next = c + 1 < chunks ? &block.gate : next;
        job.next_row = c + 1 < chunks ? begin : next_row;
        kernels.multiply(job);
        kernels.silu_mul(gate, up, count * width);
        const MatrixLayout& down = block.down.layout;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t row = hidden_row + first + t;
            const float* values = gate + t * width;
            if (hidden.keep_values) std::copy(values, values + width, hidden.values.get() + row * down.cols + begin);
            if (down.kind == Kind::affine)
                hidden.form.prepare(kernels, values, row, begin, end, down.bits, down.group, exact);
        }
    }
}

}  // namespace

void linear(Input& x, const Target* targets, int count) {
    const MatrixKernels& kernels = matrix_kernels();
    std::vector<const Activations*> inputs(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) inputs[i] = &x.for_layout(targets[i].matrix->layout);
    const int rows = static_cast<int>(x.rows());
    std::vector<int64_t> starts{0};
    for (int i = 0; i < count; ++i) {
        const MatrixLayout& m = targets[i].matrix->layout;
        starts.push_back(starts.back() + items_of(m.rows, item_rows(m, rows)));
    }
    pool().parallel_for(starts.back(), 1, [&](int64_t begin_item, int64_t end_item) {
        const auto most = [&](int64_t) { return run_items(rows); };
        for_each_run(starts, begin_item, end_item, most, [&](int64_t i, int64_t first, int64_t last) {
            const MatrixLayout& m = targets[i].matrix->layout;
            const int64_t begin = first * item_rows(m, rows), end = std::min(last * item_rows(m, rows), m.rows);
            kernels.multiply({targets[i].matrix, begin, end, inputs[i], nullptr, rows, targets[i].out + begin, m.rows,
                              nullptr, x.exact(), m.rows, i + 1 < count ? targets[i + 1].matrix : nullptr, 0});
        });
    });
}

void gated_blocks(Input& x, const Block* blocks, int count, float* out, int64_t out_stride) {
    if (count == 0) return;
    const MatrixKernels& kernels = matrix_kernels();
    thread_local Hidden hidden;
    thread_local std::vector<int64_t> rows;   // [count + 1] first hidden row of a block
    thread_local std::vector<int64_t> wide;   // [count + 1] first gate and up item of a block
    thread_local std::vector<int64_t> items;  // [count + 1] first down item of a block
    thread_local std::vector<int32_t> order;  // 0, 1, 2, ...
    // Captured by reference below: a thread_local name would mean the worker's own.
    Hidden& h = hidden;
    std::vector<int64_t>& row_starts = rows;
    std::vector<int64_t>& wide_starts = wide;
    std::vector<int64_t>& item_starts = items;
    const MatrixLayout& gate = blocks[0].gate.layout;
    const MatrixLayout& down = blocks[0].down.layout;
    row_starts.assign(1, 0);
    wide_starts.assign(1, 0);
    item_starts.assign(1, 0);
    for (int i = 0; i < count; ++i) {
        row_starts.push_back(row_starts.back() + blocks[i].count);
        wide_starts.push_back(wide_starts.back() + items_of(gate.rows, hidden_rows(down, blocks[i].count)));
        item_starts.push_back(item_starts.back() + items_of(down.rows, item_rows(down, blocks[i].count)));
    }
    while (static_cast<int64_t>(order.size()) < std::max(row_starts.back(), x.rows()))
        order.push_back(static_cast<int32_t>(order.size()));
    const int32_t* identity = order.data();
    h.resize(row_starts.back(), down, x.exact());
    const Activations& gate_x = x.for_layout(gate);
    const Activations& up_x = x.for_layout(blocks[0].up.layout);

    const auto most = [&](int64_t i) { return run_items(blocks[i].count); };
    pool().parallel_for(wide_starts.back(), 1, [&](int64_t begin_item, int64_t end_item) {
        for_each_run(wide_starts, begin_item, end_item, most, [&](int64_t i, int64_t first, int64_t last) {
            Block block = blocks[i];
            if (block.x_rows == nullptr) block.x_rows = identity;
            const int64_t per_item = hidden_rows(down, block.count);
            const int64_t begin = first * per_item, end = std::min(last * per_item, gate.rows);
            const MatrixView* next = end < gate.rows ? &block.gate : i + 1 < count ? &blocks[i + 1].gate : nullptr;
            hidden_item(kernels, block, gate_x, up_x, x.exact(), begin, end, row_starts[i], next,
                        end < gate.rows ? end : 0, h);
        });
    });
    pool().parallel_for(item_starts.back(), 1, [&](int64_t begin_item, int64_t end_item) {
        for_each_run(item_starts, begin_item, end_item, most, [&](int64_t i, int64_t first, int64_t last) {
            const Block& block = blocks[i];
            const int64_t per_item = item_rows(down, block.count);
            const int64_t begin = first * per_item, end = std::min(last * per_item, down.rows);
            // Hidden rows of a block are consecutive.
            kernels.multiply({&block.down, begin, end, &h.view, identity + row_starts[i], block.count, out + begin,
                              out_stride, block.out_rows, x.exact(), down.rows,
                              i + 1 < count ? &blocks[i + 1].down : nullptr, 0});
        });
    });
}

void embed(const MatrixView& table, const int32_t* ids, int64_t count, float* out) {
    const MatrixKernels& kernels = matrix_kernels();
    pool().parallel_for(count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels.dequantise(table, ids[i], out + i * table.layout.cols);
    });
}

}  // namespace moestream
