// The handle of an encoded matrix, as Python holds it.
#pragma once
#include <nanobind/ndarray.h>

#include <cstdint>
#include <vector>

#include "cpu/matrix/kernels.h"

namespace moestream {

using ConstBytes = nanobind::ndarray<const uint8_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// A matrix whose parts live in arrays that the handle keeps alive. Throws std::invalid_argument if they are too short.
struct Matrix {
    MatrixView view;
    std::vector<ConstBytes> parts;

    Matrix(const MatrixLayout& layout, std::vector<ConstBytes> arrays);
};

}  // namespace moestream
