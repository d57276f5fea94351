// Python face of cpu/steps.h: a step is made once, with all checked that never changes, and run for every token.
#include "cpu/steps.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "bind/matrix.h"
#include "bind/sequence.h"

namespace nb = nanobind;

namespace moestream {
namespace {

void expect_matrix(const Matrix& matrix, const char* name, int64_t rows, int64_t cols) {
    const MatrixLayout& m = matrix.view.layout;
    if (m.rows != rows || m.cols != cols)
        fail(std::string(name) + " must be [" + std::to_string(rows) + ", " + std::to_string(cols) + "], got [" +
             std::to_string(m.rows) + ", " + std::to_string(m.cols) + "]");
}

struct Attention {
    AttentionStep step;
    AttentionArgs constants;

    Attention(const In& norm, const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& o, const In& q_norm,
              const In& k_norm, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotary_dim, bool gated,
              float eps)
        : step{norm.data(), q.view, k.view, v.view, o.view},
          constants(attention_constants(q_norm, k_norm, heads, kv_heads, head_dim, rotary_dim, gated, eps)) {
        const int64_t hidden = o.view.layout.rows;
        constants.tokens = 1;
        expect(norm, "norm", {hidden});
        expect_matrix(q, "q", heads * head_dim * (gated ? 2 : 1), hidden);
        expect_matrix(k, "k", kv_heads * head_dim, hidden);
        expect_matrix(v, "v", kv_heads * head_dim, hidden);
        expect_matrix(o, "o", hidden, heads * head_dim);
    }

    void run(const In& x, const In& cos, const In& sin, const std::vector<OutAny>& cache_k,
             const std::vector<OutAny>& cache_v, const std::vector<int64_t>& lengths, bool exact,
             const Out& out) const {
        const int64_t rows = rows_of(x, "x"), half = constants.rotary_dim / 2;
        expect(x, "x", {rows, step.o.layout.rows});
        expect(cos, "cos", {rows, half});
        expect(sin, "sin", {rows, half});
        expect(out, "out", {rows, step.o.layout.rows});
        const auto count = static_cast<size_t>(rows);
        require(cache_k.size() == count && cache_v.size() == count && lengths.size() == count,
                "a step needs one cache for each row");
        std::vector<AttentionArgs> sequences(count, constants);
        for (size_t i = 0; i < count; ++i) {
            use_cache(cache_k[i], cache_v[i], lengths[i], sequences[i]);
            sequences[i].cos = cos.data() + static_cast<int64_t>(i) * half;
            sequences[i].sin = sin.data() + static_cast<int64_t>(i) * half;
        }
        nb::gil_scoped_release release;
        step.run(x.data(), sequences, exact, out.data());
    }
};

struct DeltaNet {
    DeltaNetStep step;
    DeltaNetArgs constants;

    DeltaNet(const In& input_norm, const Matrix& u, const Matrix& z, const Matrix& b, const Matrix& a,
             const Matrix& out_proj, const In& conv, const In& neg_exp_a, const In& dt_bias, const In& norm,
             int64_t key_heads, int64_t value_heads, int64_t key_dim, int64_t value_dim, float eps)
        : step{input_norm.data(), u.view, z.view, b.view, a.view, out_proj.view},
          constants(
              delta_net_constants(conv, neg_exp_a, dt_bias, norm, key_heads, value_heads, key_dim, value_dim, eps)) {
        const int64_t hidden = out_proj.view.layout.rows;
        constants.tokens = 1;
        expect(input_norm, "input_norm", {hidden});
        expect_matrix(u, "u", constants.channels(), hidden);
        expect_matrix(z, "z", value_heads * value_dim, hidden);
        expect_matrix(b, "b", value_heads, hidden);
        expect_matrix(a, "a", value_heads, hidden);
        expect_matrix(out_proj, "out_proj", hidden, value_heads * value_dim);
    }

    void run(const In& x, const std::vector<Out>& conv, const std::vector<Out>& s, bool exact, const Out& out) const {
        const int64_t rows = rows_of(x, "x");
        expect(x, "x", {rows, step.out_proj.layout.rows});
        expect(out, "out", {rows, step.out_proj.layout.rows});
        const auto count = static_cast<size_t>(rows);
        require(conv.size() == count && s.size() == count, "a step needs one state for each row");
        std::vector<DeltaNetArgs> sequences(count, constants);
        for (size_t i = 0; i < count; ++i) use_state(conv[i], s[i], sequences[i]);
        nb::gil_scoped_release release;
        step.run(x.data(), sequences, exact, out.data());
    }
};

struct Route {
    RouteStep step;

    Route(const In& norm, float eps, const Matrix& router, const Matrix* shared_gate, bool renormalise)
        : step{norm.data(), eps, router.view, shared_gate != nullptr ? &shared_gate->view : nullptr, renormalise} {
        expect(norm, "norm", {router.view.layout.cols});
        if (shared_gate != nullptr) expect_matrix(*shared_gate, "shared_gate", 1, router.view.layout.cols);
    }

    void run(const In& x, bool exact, const Out& normed, const OutIds& ids, const Out& weights,
             const std::optional<Out>& gate) const {
        const int64_t rows = rows_of(x, "x"), experts = step.router.layout.rows;
        rows_of(ids, "ids");
        const auto k = static_cast<int64_t>(ids.shape(1));
        if (k < 1 || k > experts) fail("k must be between 1 and the number of experts " + std::to_string(experts));
        expect(x, "x", {rows, step.router.layout.cols});
        expect(normed, "normed", {rows, step.router.layout.cols});
        expect(ids, "ids", {rows, k});
        expect(weights, "weights", {rows, k});
        require(gate.has_value() == (step.shared_gate != nullptr), "gate belongs to a shared gate");
        if (gate) expect(*gate, "gate", {rows, 1});
        nb::gil_scoped_release release;
        step.run(x.data(), rows, k, exact, normed.data(), ids.data(), weights.data(), gate ? gate->data() : nullptr);
    }
};

}  // namespace

// A step keeps alive what it points into.
void bind_steps(nb::module_& m) {
    nb::class_<Attention>(m, "AttentionStep")
        .def(nb::init<const In&, const Matrix&, const Matrix&, const Matrix&, const Matrix&, const In&, const In&,
                      int64_t, int64_t, int64_t, int64_t, bool, float>(),
             nb::arg("norm").noconvert(), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("o"),
             nb::arg("q_norm").noconvert(), nb::arg("k_norm").noconvert(), nb::arg("heads"), nb::arg("kv_heads"),
             nb::arg("head_dim"), nb::arg("rotary_dim"), nb::arg("gated"), nb::arg("eps"), nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
             nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>())
        .def("run", &Attention::run, nb::arg("x").noconvert(), nb::arg("cos").noconvert(), nb::arg("sin").noconvert(),
             nb::arg("cache_k").noconvert(), nb::arg("cache_v").noconvert(), nb::arg("lengths"), nb::arg("exact"),
             nb::arg("out").noconvert());
    nb::class_<DeltaNet>(m, "DeltaNetStep")
        .def(nb::init<const In&, const Matrix&, const Matrix&, const Matrix&, const Matrix&, const Matrix&, const In&,
                      const In&, const In&, const In&, int64_t, int64_t, int64_t, int64_t, float>(),
             nb::arg("input_norm").noconvert(), nb::arg("u"), nb::arg("z"), nb::arg("b"), nb::arg("a"),
             nb::arg("out_proj"), nb::arg("conv").noconvert(), nb::arg("neg_exp_a").noconvert(),
             nb::arg("dt_bias").noconvert(), nb::arg("norm").noconvert(), nb::arg("key_heads"), nb::arg("value_heads"),
             nb::arg("key_dim"), nb::arg("value_dim"), nb::arg("eps"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(),
             nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>(), nb::keep_alive<1, 11>())
        .def("run", &DeltaNet::run, nb::arg("x").noconvert(), nb::arg("conv").noconvert(), nb::arg("s").noconvert(),
             nb::arg("exact"), nb::arg("out").noconvert());
    nb::class_<Route>(m, "RouteStep")
        .def(nb::init<const In&, float, const Matrix&, const Matrix*, bool>(), nb::arg("norm").noconvert(),
             nb::arg("eps"), nb::arg("router"), nb::arg("shared_gate").none(), nb::arg("renormalise"),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
        .def("run", &Route::run, nb::arg("x").noconvert(), nb::arg("exact"), nb::arg("normed").noconvert(),
             nb::arg("ids").noconvert(), nb::arg("weights").noconvert(), nb::arg("gate").noconvert().none());
}

}  // namespace moestream
