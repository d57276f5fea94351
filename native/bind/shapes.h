// Arrays of the Python face, and checks that name the one whose shape is wrong.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace moestream {

using In = nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>;
using Out = nanobind::ndarray<float, nanobind::c_contig, nanobind::device::cpu>;
using OutIds = nanobind::ndarray<int32_t, nanobind::c_contig, nanobind::device::cpu>;
using OutAny = nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>;

[[noreturn]] inline void fail(const std::string& message) { throw nanobind::value_error(message.c_str()); }

template <class Array>
std::string shape_of(const Array& array) {
    std::string text = "[";
    for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + "]";
}

template <class Array>
void expect(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
    bool same = array.ndim() == shape.size();
    size_t i = 0;
    for (int64_t n : shape) same = same && static_cast<int64_t>(array.shape(i++)) == n;
    if (same) return;
    std::string wanted;
    for (int64_t n : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
    fail(std::string(name) + " must be [" + wanted + "], got " + shape_of(array));
}

template <class Array>
int64_t rows_of(const Array& array, const char* name) {
    if (array.ndim() != 2) fail(std::string(name) + " must have 2 dimensions, got " + shape_of(array));
    return static_cast<int64_t>(array.shape(0));
}

inline void require(bool holds, const char* message) {
    if (!holds) fail(message);
}

}  // namespace moestream
