#include "cpu/matrix/input.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/pool.h"

namespace moestream {

const MatrixKernels& matrix_kernels() {
    switch (active_isa()) {
#if defined(__x86_64__)
        case Isa::avx512:
            return matrix_kernels_avx512();
        case Isa::avx2:
            return matrix_kernels_avx2();
#elif defined(__aarch64__)
        case Isa::neon:
            return matrix_kernels_neon();
#endif
        default:
            return matrix_kernels_portable();
    }
}

namespace {
int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
}  // namespace

void Form::resize(int64_t rows, int64_t cols, int group, bool exact) {
    const int64_t groups = cols / group;
    view_ = {};
    view_.code_stride = round_up(cols, kPadColumns);
    view_.group_stride = round_up(groups, kPadGroups);
    float* sums = sums_.resize(rows * view_.group_stride);
    float* scales = exact ? nullptr : scales_.resize(rows * view_.group_stride);
    float* lanes = exact ? lanes_.resize(rows * view_.code_stride) : nullptr;
    int8_t* codes = exact ? nullptr : codes_.resize(rows * view_.code_stride);
    // Interleaved orders spread the last columns over the last kPadColumns positions.
    const int64_t tail = view_.code_stride == cols ? 0 : kPadColumns;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t group_end = (row + 1) * view_.group_stride;
        std::fill(sums + row * view_.group_stride + groups, sums + group_end, 0.0F);
        if (!exact) std::fill(scales + row * view_.group_stride + groups, scales + group_end, 0.0F);
        const int64_t code_end = (row + 1) * view_.code_stride;
        if (exact) std::fill(lanes + code_end - tail, lanes + code_end, 0.0F);
        if (!exact) std::fill(codes + code_end - tail, codes + code_end, int8_t{0});
    }
    view_.sums = sums;
    view_.scales = scales;
    view_.lanes = lanes;
    view_.codes = codes;
}

void Form::prepare(const MatrixKernels& kernels, const float* x, int64_t row, int64_t begin, int64_t end, int bits,
                   int group, bool exact) {
    const int64_t codes_at = row * view_.code_stride;
    const int64_t groups_at = row * view_.group_stride;
    kernels.prepare(x, begin, end, bits, group, exact, exact ? nullptr : codes_.get() + codes_at,
                    exact ? lanes_.get() + codes_at : nullptr, exact ? nullptr : scales_.get() + groups_at,
                    sums_.get() + groups_at);
}

void Input::bind(const float* values, int64_t rows, int64_t cols, bool exact) {
    values_ = values;
    rows_ = rows;
    cols_ = cols;
    exact_ = exact;
    plain_ = {};
    plain_.values = values;
    plain_.value_stride = cols;
    used_ = 0;
}

const Activations& Input::for_layout(const MatrixLayout& layout) {
    if (layout.kind != Kind::affine) return plain_;
    const MatrixKernels& kernels = matrix_kernels();
    const bool interleaved = layout.bits == 4;
    for (size_t i = 0; i < used_; ++i) {
        const Entry& e = entries_[i];
        if (e.kernels == &kernels && e.interleaved == interleaved && e.group == layout.group) return e.form->view();
    }
    if (used_ == entries_.size()) entries_.push_back({nullptr, false, 0, std::make_unique<Form>()});
    Entry& entry = entries_[used_++];
    entry.kernels = &kernels;
    entry.interleaved = interleaved;
    entry.group = layout.group;
    Form& form = *entry.form;
    form.resize(rows_, cols_, layout.group, exact_);
    form.set_values(values_, cols_);
    const int64_t grain = std::max<int64_t>(1, 32768 / cols_);
    pool().parallel_for(rows_, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            form.prepare(kernels, values_ + row * cols_, row, 0, cols_, layout.bits, layout.group, exact_);
    });
    return form.view();
}

}  // namespace moestream
