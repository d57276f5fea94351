// Encoded matrices: handles, products, and the probes that bench and doctor print as ceilings.
#include "bind/matrix.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "cpu/matrix/input.h"
#include "cpu/matrix/probes.h"
#include "cpu/matrix/products.h"
#include "cpu/sequence/sequence.h"

namespace nb = nanobind;

namespace moestream {
namespace {

using FloatRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstFloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstIds = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstOffsets = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void reject(const std::string& what) { throw std::invalid_argument(what); }

Kind parse_kind(const std::string& name) {
    if (name == "affine") return Kind::affine;
    if (name == "bf16") return Kind::bf16;
    if (name == "f16") return Kind::f16;
    if (name == "f32") return Kind::f32;
    reject("encoding must be affine, bf16, f16 or f32, got '" + name + "'");
}

template <class... T>
bool one_of(int value, T... allowed) {
    return ((value == allowed) || ...);
}

MatrixLayout make_layout(int64_t rows, int64_t cols, const std::string& kind, int bits, int group,
                         const std::string& scale_kind) {
    MatrixLayout m{rows, cols, parse_kind(kind), Kind::f32, bits, group};
    if (rows < 1 || cols < 1) reject("a matrix needs at least one row and one column");
    if (m.kind != Kind::affine) return m;
    m.scale_kind = parse_kind(scale_kind);
    if (m.scale_kind == Kind::affine) reject("scales must be bf16, f16 or f32");
    if (!one_of(bits, 2, 3, 4, 6, 8)) reject("affine bits must be 2, 3, 4, 6 or 8, got " + std::to_string(bits));
    if (!one_of(group, 32, 64, 128)) reject("affine group must be 32, 64 or 128, got " + std::to_string(group));
    if (cols % group != 0)
        reject(std::to_string(cols) + " columns are not a multiple of the group " + std::to_string(group));
    return m;
}

int parts_of(const MatrixLayout& m) { return m.kind == Kind::affine ? 3 : 1; }

std::vector<int64_t> part_bytes(const MatrixLayout& m) {
    const auto float_bytes = [](Kind kind) { return kind == Kind::f32 ? 4 : 2; };
    if (m.kind != Kind::affine) return {m.rows * m.cols * float_bytes(m.kind)};
    const int64_t scales = m.rows * (m.cols / m.group) * float_bytes(m.scale_kind);
    return {m.rows * m.cols * m.bits / 8, scales, scales};
}

void expect_shape(const FloatRows& array, int64_t rows, int64_t cols, const char* name) {
    if (static_cast<int64_t>(array.shape(0)) != rows || static_cast<int64_t>(array.shape(1)) != cols)
        reject(std::string(name) + " must be [" + std::to_string(rows) + ", " + std::to_string(cols) + "], got [" +
               std::to_string(array.shape(0)) + ", " + std::to_string(array.shape(1)) + "]");
}

void expect_input(const Input& x, const MatrixLayout& m) {
    if (x.cols() != m.cols)
        reject("an input of " + std::to_string(x.cols()) + " columns meets a matrix of " + std::to_string(m.cols));
}

std::vector<Target> targets_of(const Input& x, const std::vector<Matrix*>& matrices,
                               const std::vector<FloatRows>& outs) {
    if (matrices.size() != outs.size()) reject("linear needs one output per matrix");
    std::vector<Target> targets;
    for (size_t i = 0; i < matrices.size(); ++i) {
        const MatrixLayout& m = matrices[i]->view.layout;
        expect_input(x, m);
        expect_shape(outs[i], x.rows(), m.rows, "out");
        targets.push_back({&matrices[i]->view, outs[i].data()});
    }
    return targets;
}

void run_linear(Input& x, const std::vector<Matrix*>& matrices, const std::vector<FloatRows>& outs) {
    const std::vector<Target> targets = targets_of(x, matrices, outs);
    nb::gil_scoped_release release;
    linear(x, targets.data(), static_cast<int>(targets.size()));
}

void run_normed_linear(Input& x, const ConstFloatRows& rows, const ConstFloats& weight, float eps, bool exact,
                       const FloatRows& normed, const std::vector<Matrix*>& matrices,
                       const std::vector<FloatRows>& outs) {
    const auto count = static_cast<int64_t>(rows.shape(0)), width = static_cast<int64_t>(rows.shape(1));
    if (static_cast<int64_t>(weight.size()) != width) reject("the norm's weight does not fit the input");
    expect_shape(normed, count, width, "normed");
    x.bind(normed.data(), count, width, exact);
    const std::vector<Target> targets = targets_of(x, matrices, outs);
    nb::gil_scoped_release release;
    rms_norm(rows.data(), weight.data(), eps, count, width, normed.data());
    linear(x, targets.data(), static_cast<int>(targets.size()));
}

void run_linear_onto(Input& x, Matrix& matrix, const ConstFloatRows& onto, const FloatRows& out) {
    const std::vector<Target> targets = targets_of(x, {&matrix}, {out});
    if (onto.shape(0) != out.shape(0) || onto.shape(1) != out.shape(1)) reject("onto must have the shape of out");
    nb::gil_scoped_release release;
    linear(x, targets.data(), 1);
    add(onto.data(), static_cast<int64_t>(onto.size()), out.data());
}

void expect_block(const Input& x, const MatrixLayout& gate, const MatrixLayout& up, const MatrixLayout& down) {
    expect_input(x, gate);
    if (up.rows != gate.rows || up.cols != gate.cols || down.cols != gate.rows)
        reject("gate, up and down shapes do not fit together");
}

void run_swiglu(Input& x, const Matrix& gate, const Matrix& up, const Matrix& down, const FloatRows& out) {
    expect_block(x, gate.view.layout, up.view.layout, down.view.layout);
    expect_shape(out, x.rows(), down.view.layout.rows, "out");
    const Block block{gate.view, up.view, down.view, nullptr, nullptr, static_cast<int>(x.rows())};
    nb::gil_scoped_release release;
    if (block.count > 0) gated_blocks(x, &block, 1, out.data(), down.view.layout.rows);
}

// What every expert of a layer looks like, made once so that a wave costs one call.
struct Experts {
    MatrixLayout layouts[3];
    std::vector<int64_t> sizes;
    std::vector<Block> blocks;
    std::vector<int32_t> rows;

    Experts(const MatrixLayout& gate, const MatrixLayout& up, const MatrixLayout& down) : layouts{gate, up, down} {
        for (const MatrixLayout& m : layouts)
            for (const int64_t size : part_bytes(m)) sizes.push_back(size);
    }

    // Expert i lies at row offset_rows[i] of offsets, or at row i.
    void run(Input& x, const ConstBytes& memory, const ConstOffsets& offsets,
             const std::optional<ConstIds>& offset_rows, const ConstIds& starts, const ConstIds& pairs, int64_t k,
             const FloatRows& out) {
        const auto count = static_cast<int64_t>(offset_rows ? offset_rows->size() : offsets.shape(0));
        const auto row_of = [&](int64_t e) { return offset_rows ? offset_rows->data()[e] : e; };
        check(x, count, starts, pairs, k, out);
        check_offsets(memory, offsets, count, row_of);
        rows.clear();
        for (size_t i = 0; i < pairs.size(); ++i) rows.push_back(pairs.data()[i] / static_cast<int32_t>(k));
        blocks.clear();
        for (int64_t e = 0; e < count; ++e) {
            Block block{};
            const int64_t* at = offsets.data() + row_of(e) * static_cast<int64_t>(sizes.size());
            MatrixView* views[3] = {&block.gate, &block.up, &block.down};
            for (int i = 0; i < 3; ++i) {
                const bool affine = parts_of(layouts[i]) == 3;
                *views[i] = {layouts[i], memory.data() + at[0], affine ? memory.data() + at[1] : nullptr,
                             affine ? memory.data() + at[2] : nullptr};
                at += affine ? 3 : 1;
            }
            const int32_t first = starts.data()[e];
            block.x_rows = rows.data() + first;
            block.out_rows = pairs.data() + first;
            block.count = starts.data()[e + 1] - first;
            if (block.count > 0) blocks.push_back(block);
        }
        nb::gil_scoped_release release;
        gated_blocks(x, blocks.data(), static_cast<int>(blocks.size()), out.data(), static_cast<int64_t>(out.shape(1)));
    }

    void check(const Input& x, int64_t count, const ConstIds& starts, const ConstIds& pairs, int64_t k,
               const FloatRows& out) const {
        expect_block(x, layouts[0], layouts[1], layouts[2]);
        if (k < 1) reject("k must be at least 1");
        expect_shape(out, x.rows() * k, layouts[2].rows, "out");
        if (static_cast<int64_t>(starts.size()) != count + 1 || starts.data()[0] != 0 ||
            starts.data()[count] != static_cast<int64_t>(pairs.size()) ||
            !std::is_sorted(starts.data(), starts.data() + count + 1))
            reject("starts must rise from 0 to the number of pairs, one more than there are experts");
        for (size_t i = 0; i < pairs.size(); ++i)
            if (pairs.data()[i] < 0 || pairs.data()[i] >= x.rows() * k) reject("a pair is outside of the input");
    }

    template <class RowOf>
    void check_offsets(const ConstBytes& memory, const ConstOffsets& offsets, int64_t count, RowOf&& row_of) const {
        if (offsets.shape(1) != sizes.size()) reject("offsets must have one column per part of an expert");
        for (int64_t e = 0; e < count; ++e) {
            const int64_t row = row_of(e);
            if (row < 0 || row >= static_cast<int64_t>(offsets.shape(0)))
                reject("there is no expert " + std::to_string(row));
            for (size_t p = 0; p < sizes.size(); ++p) {
                const int64_t at = offsets.data()[row * static_cast<int64_t>(sizes.size()) + static_cast<int64_t>(p)];
                if (at < 0 || at + sizes[p] > static_cast<int64_t>(memory.size()))
                    reject("part " + std::to_string(p) + " of an expert lies outside of the memory");
            }
        }
    }
};

void run_embed(const ConstIds& ids, const Matrix& table, const FloatRows& out) {
    expect_shape(out, static_cast<int64_t>(ids.size()), table.view.layout.cols, "out");
    for (size_t i = 0; i < ids.size(); ++i)
        if (ids.data()[i] < 0 || ids.data()[i] >= table.view.layout.rows)
            reject("id " + std::to_string(ids.data()[i]) + " is outside of the table");
    nb::gil_scoped_release release;
    embed(table.view, ids.data(), static_cast<int64_t>(ids.size()), out.data());
}

}  // namespace

Matrix::Matrix(const MatrixLayout& layout, std::vector<ConstBytes> arrays) : view{layout, nullptr, nullptr, nullptr} {
    const std::vector<int64_t> sizes = part_bytes(layout);
    if (arrays.size() != sizes.size())
        reject("expected " + std::to_string(sizes.size()) + " parts, got " + std::to_string(arrays.size()));
    for (size_t i = 0; i < sizes.size(); ++i)
        if (static_cast<int64_t>(arrays[i].size()) < sizes[i])
            reject("part " + std::to_string(i) + " holds " + std::to_string(arrays[i].size()) + " bytes, needs " +
                   std::to_string(sizes[i]));
    parts = std::move(arrays);
    view.codes = parts[0].data();
    if (parts.size() == 3) {
        view.scales = parts[1].data();
        view.biases = parts[2].data();
    }
}

void bind_matrix(nb::module_& m) {
    // noconvert: a converted copy would be read after its end, or written in vain.
    nb::class_<MatrixLayout>(m, "MatrixLayout")
        .def(
            "__init__",
            [](MatrixLayout* self, int64_t rows, int64_t cols, const std::string& kind, int bits, int group,
               const std::string& scale_kind) {
                new (self) MatrixLayout(make_layout(rows, cols, kind, bits, group, scale_kind));
            },
            nb::arg("rows"), nb::arg("cols"), nb::arg("kind"), nb::arg("bits") = 0, nb::arg("group") = 0,
            nb::arg("scale_dtype") = "bf16");
    nb::class_<Matrix>(m, "Matrix")
        .def(nb::init<const MatrixLayout&, std::vector<ConstBytes>>(), nb::arg("layout"), nb::arg("parts").noconvert())
        .def_prop_ro("rows", [](const Matrix& self) { return self.view.layout.rows; })
        .def_prop_ro("cols", [](const Matrix& self) { return self.view.layout.cols; });
    nb::class_<Input>(m, "Input")
        .def(nb::init<>())
        .def(
            "bind",
            [](Input& self, const ConstFloatRows& x, bool exact) {
                self.bind(x.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), exact);
            },
            nb::arg("x").noconvert(), nb::arg("exact"),
            "Takes `x` [T, K] as the input; the caller keeps it alive and unchanged.");
    nb::class_<Experts>(m, "Experts")
        .def(nb::init<const MatrixLayout&, const MatrixLayout&, const MatrixLayout&>(), nb::arg("gate"), nb::arg("up"),
             nb::arg("down"))
        .def("run", &Experts::run, nb::arg("x").noconvert(), nb::arg("memory").noconvert(),
             nb::arg("offsets").noconvert(), nb::arg("offset_rows").noconvert().none(), nb::arg("starts").noconvert(),
             nb::arg("pairs").noconvert(), nb::arg("k"), nb::arg("out").noconvert());
    m.def("linear", &run_linear, nb::arg("x").noconvert(), nb::arg("matrices"), nb::arg("outs").noconvert());
    m.def("normed_linear", &run_normed_linear, nb::arg("x").noconvert(), nb::arg("rows").noconvert(),
          nb::arg("weight").noconvert(), nb::arg("eps"), nb::arg("exact"), nb::arg("normed").noconvert(),
          nb::arg("matrices"), nb::arg("outs").noconvert(),
          "RMSNorm of `rows` [T, K] into `normed`, which becomes the input, and its products. The caller keeps it "
          "alive.");
    m.def("linear_onto", &run_linear_onto, nb::arg("x").noconvert(), nb::arg("matrix"), nb::arg("onto").noconvert(),
          nb::arg("out").noconvert());
    m.def("swiglu", &run_swiglu, nb::arg("x").noconvert(), nb::arg("gate"), nb::arg("up"), nb::arg("down"),
          nb::arg("out").noconvert());
    m.def("embed", &run_embed, nb::arg("ids").noconvert(), nb::arg("table"), nb::arg("out").noconvert());
    m.def("memory_bandwidth", &memory_bandwidth, nb::arg("nbytes"), nb::arg("seconds"),
          nb::call_guard<nb::gil_scoped_release>(), "Bytes per second of a streaming read by the pool.");
    m.def("int8_peak", &int8_peak, nb::arg("seconds") = 0.1, nb::call_guard<nb::gil_scoped_release>(),
          "Integer operations per second of the pool: int8 products, int32 sums.");
    m.def("fma_peak", &fma_peak, nb::arg("seconds") = 0.1, nb::call_guard<nb::gil_scoped_release>(),
          "Float32 operations per second of the pool.");
}

}  // namespace moestream
