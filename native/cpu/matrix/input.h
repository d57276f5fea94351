// An input of matrix products, prepared at most once for every form the kernels ask for.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cpu/matrix/kernels.h"

namespace moestream {

// 64-byte aligned memory that only grows; contents are undefined after a resize.
template <class T>
class Buffer {
public:
    T* resize(int64_t count) {
        if (count > capacity_) {
            data_.reset(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlign)));
            capacity_ = count;
        }
        return data_.get();
    }
    T* get() { return data_.get(); }

private:
    static constexpr std::align_val_t kAlign{64};
    struct Free {
        void operator()(T* p) const { ::operator delete(p, kAlign); }
    };
    std::unique_ptr<T, Free> data_;
    int64_t capacity_ = 0;
};

// The prepared forms of [T, K] values for one code order and group length.
class Form {
public:
    // Makes room and zeroes the padding of every row; rows are then written with prepare().
    void resize(int64_t rows, int64_t cols, int group, bool exact);
    // Columns [begin, end) of one row; `x` points at column `begin`. Different rows or columns may run in parallel.
    void prepare(const MatrixKernels& kernels, const float* x, int64_t row, int64_t begin, int64_t end, int bits,
                 int group, bool exact);
    const Activations& view() const { return view_; }
    void set_values(const float* values, int64_t stride) {
        view_.values = values;
        view_.value_stride = stride;
    }

private:
    Activations view_;
    Buffer<int8_t> codes_;
    Buffer<float> lanes_;
    Buffer<float> scales_;
    Buffer<float> sums_;
};

// Thread rule: used by one thread at a time (it spreads its own work over the pool).
class Input {
public:
    Input() = default;
    Input(const Input&) = delete;
    Input& operator=(const Input&) = delete;

    // Forgets what was prepared. `values` [rows, cols] must stay valid until the last product.
    void bind(const float* values, int64_t rows, int64_t cols, bool exact);
    // The forms a matrix of this layout needs; the reference is valid until the next bind().
    const Activations& for_layout(const MatrixLayout& layout);

    int64_t rows() const { return rows_; }
    int64_t cols() const { return cols_; }
    bool exact() const { return exact_; }

private:
    struct Entry {
        const MatrixKernels* kernels;
        bool interleaved;
        int group;
        std::unique_ptr<Form> form;
    };
    const float* values_ = nullptr;
    int64_t rows_ = 0;
    int64_t cols_ = 0;
    bool exact_ = false;
    Activations plain_;
    std::vector<Entry> entries_;  // the first used_ hold forms of the bound values
    size_t used_ = 0;
};

}  // namespace moestream
