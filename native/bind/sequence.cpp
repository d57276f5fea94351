// Python face of cpu/sequence: checks shapes, then runs without the GIL.
#include "cpu/sequence/sequence.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "bind/bind.h"

namespace nb = nanobind;

namespace moestream {
namespace {

using In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using OutIds = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;
using OutAny = nb::ndarray<nb::c_contig, nb::device::cpu>;

[[noreturn]] void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

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

void require(bool holds, const char* message) {
    if (!holds) fail(message);
}

void bind_rms_norm(const In& x, const In& weight, float eps, const Out& out) {
    const int64_t rows = rows_of(x, "x"), width = static_cast<int64_t>(x.shape(1));
    expect(weight, "weight", {width});
    expect(out, "out", {rows, width});
    nb::gil_scoped_release release;
    rms_norm(x.data(), weight.data(), eps, rows, width, out.data());
}

void bind_route(const In& logits, bool renormalise, const OutIds& ids, const Out& weights) {
    const int64_t rows = rows_of(logits, "logits"), experts = static_cast<int64_t>(logits.shape(1));
    rows_of(ids, "ids");
    const int64_t k = static_cast<int64_t>(ids.shape(1));
    if (k < 1 || k > experts)
        fail("k must be between 1 and the number of experts " + std::to_string(experts) + ", got " + std::to_string(k));
    expect(ids, "ids", {rows, k});
    expect(weights, "weights", {rows, k});
    nb::gil_scoped_release release;
    route(logits.data(), rows, experts, k, renormalise, ids.data(), weights.data());
}

void bind_combine(const In& x, const In& expert_out, const In& weights, const std::optional<In>& shared,
                  const std::optional<In>& shared_gate, const Out& out) {
    const int64_t rows = rows_of(x, "x"), width = static_cast<int64_t>(x.shape(1));
    rows_of(weights, "weights");
    const int64_t k = static_cast<int64_t>(weights.shape(1));
    expect(weights, "weights", {rows, k});
    expect(expert_out, "expert_out", {rows * k, width});
    expect(out, "out", {rows, width});
    if (shared) expect(*shared, "shared", {rows, width});
    if (shared_gate) expect(*shared_gate, "shared_gate", {rows, 1});
    nb::gil_scoped_release release;
    combine(x.data(), expert_out.data(), weights.data(), shared ? shared->data() : nullptr,
            shared && shared_gate ? shared_gate->data() : nullptr, rows, k, width, out.data());
}

void bind_attention(const In& q, const In& k, const In& v, const In& cos, const In& sin, const In& q_norm,
                    const In& k_norm, const OutAny& cache_k, const OutAny& cache_v, int64_t length, int64_t heads,
                    int64_t kv_heads, int64_t head_dim, int64_t rotary_dim, bool gated, float eps, const Out& out) {
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "heads must be a positive multiple of kv_heads");
    require(head_dim > 0 && head_dim <= kMaxHeadDim, "head_dim must be between 1 and 1024");
    require(rotary_dim >= 0 && rotary_dim <= head_dim && rotary_dim % 2 == 0,
            "rotary_dim must be even and at most head_dim");
    const int64_t tokens = rows_of(q, "q");
    expect(q, "q", {tokens, heads * head_dim * (gated ? 2 : 1)});
    expect(k, "k", {tokens, kv_heads * head_dim});
    expect(v, "v", {tokens, kv_heads * head_dim});
    expect(cos, "cos", {tokens, rotary_dim / 2});
    expect(sin, "sin", {tokens, rotary_dim / 2});
    expect(q_norm, "q_norm", {head_dim});
    expect(k_norm, "k_norm", {head_dim});
    expect(out, "out", {tokens, heads * head_dim});
    require(cache_k.ndim() == 3, "cache.k must be [kv_heads, capacity, head_dim]");
    const int64_t capacity = static_cast<int64_t>(cache_k.shape(1));
    expect(cache_k, "cache.k", {kv_heads, capacity, head_dim});
    expect(cache_v, "cache.v", {kv_heads, capacity, head_dim});
    const nb::dlpack::dtype type = cache_k.dtype();
    require(type == cache_v.dtype() && type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) &&
                (type.bits == 16 || type.bits == 32),
            "cache.k and cache.v must both be float32 or both float16");
    if (length < 0 || length + tokens > capacity)
        fail("the cache holds " + std::to_string(length) + " of " + std::to_string(capacity) + " tokens, no room for " +
             std::to_string(tokens) + " more");
    const AttentionArgs args{
        .q = q.data(),
        .k = k.data(),
        .v = v.data(),
        .cos = cos.data(),
        .sin = sin.data(),
        .q_norm = q_norm.data(),
        .k_norm = k_norm.data(),
        .cache_k = cache_k.data(),
        .cache_v = cache_v.data(),
        .out = out.data(),
        .tokens = tokens,
        .past = length,
        .capacity = capacity,
        .heads = heads,
        .kv_heads = kv_heads,
        .head_dim = head_dim,
        .rotary_dim = rotary_dim,
        .eps = eps,
        .gated = gated,
        .half = type.bits == 16,
    };
    nb::gil_scoped_release release;
    attention(args);
}

void bind_delta_net(const In& u, const In& z, const In& b, const In& a, const In& conv, const In& neg_exp_a,
                    const In& dt_bias, const In& norm, const Out& state_conv, const Out& state_s, int64_t key_heads,
                    int64_t value_heads, int64_t key_dim, int64_t value_dim, float eps, const Out& out) {
    require(key_heads > 0 && value_heads > 0 && value_heads % key_heads == 0,
            "value_heads must be a positive multiple of key_heads");
    require(key_dim > 0 && value_dim > 0, "key_dim and value_dim must be positive");
    const int64_t tokens = rows_of(u, "u"), channels = 2 * key_heads * key_dim + value_heads * value_dim;
    rows_of(conv, "conv");
    const int64_t width = static_cast<int64_t>(conv.shape(1));
    require(width > 0 && width <= kMaxConvWidth, "conv must have 1 to 16 columns");
    expect(u, "u", {tokens, channels});
    expect(z, "z", {tokens, value_heads * value_dim});
    expect(b, "b", {tokens, value_heads});
    expect(a, "a", {tokens, value_heads});
    expect(conv, "conv", {channels, width});
    expect(neg_exp_a, "neg_exp_a", {value_heads});
    expect(dt_bias, "dt_bias", {value_heads});
    expect(norm, "norm", {value_dim});
    expect(state_conv, "state.conv", {width - 1, channels});
    expect(state_s, "state.s", {value_heads, key_dim, value_dim});
    expect(out, "out", {tokens, value_heads * value_dim});
    DeltaNetArgs args{};
    args.u = u.data();
    args.z = z.data();
    args.b = b.data();
    args.a = a.data();
    args.conv = conv.data();
    args.neg_exp_a = neg_exp_a.data();
    args.dt_bias = dt_bias.data();
    args.norm = norm.data();
    args.state_conv = state_conv.data();
    args.state_s = state_s.data();
    args.out = out.data();
    args.tokens = tokens;
    args.key_heads = key_heads;
    args.value_heads = value_heads;
    args.key_dim = key_dim;
    args.value_dim = value_dim;
    args.width = width;
    args.eps = eps;
    nb::gil_scoped_release release;
    delta_net(args);
}

}  // namespace

// Nothing is converted on the way in: a converted copy of an output would swallow the result.
void bind_sequence(nb::module_& m) {
    m.def("rms_norm", &bind_rms_norm, nb::arg("x").noconvert(), nb::arg("weight").noconvert(), nb::arg("eps"),
          nb::arg("out").noconvert());
    m.def("route", &bind_route, nb::arg("logits").noconvert(), nb::arg("renormalise"), nb::arg("ids").noconvert(),
          nb::arg("weights").noconvert());
    m.def("combine", &bind_combine, nb::arg("x").noconvert(), nb::arg("expert_out").noconvert(),
          nb::arg("weights").noconvert(), nb::arg("shared").noconvert().none(),
          nb::arg("shared_gate").noconvert().none(), nb::arg("out").noconvert());
    m.def("attention", &bind_attention, nb::arg("q").noconvert(), nb::arg("k").noconvert(), nb::arg("v").noconvert(),
          nb::arg("cos").noconvert(), nb::arg("sin").noconvert(), nb::arg("q_norm").noconvert(),
          nb::arg("k_norm").noconvert(), nb::arg("cache_k").noconvert(), nb::arg("cache_v").noconvert(),
          nb::arg("length"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("rotary_dim"),
          nb::arg("gated"), nb::arg("eps"), nb::arg("out").noconvert());
    m.def("delta_net", &bind_delta_net, nb::arg("u").noconvert(), nb::arg("z").noconvert(), nb::arg("b").noconvert(),
          nb::arg("a").noconvert(), nb::arg("conv").noconvert(), nb::arg("neg_exp_a").noconvert(),
          nb::arg("dt_bias").noconvert(), nb::arg("norm").noconvert(), nb::arg("state_conv").noconvert(),
          nb::arg("state_s").noconvert(), nb::arg("key_heads"), nb::arg("value_heads"), nb::arg("key_dim"),
          nb::arg("value_dim"), nb::arg("eps"), nb::arg("out").noconvert());
}

}  // namespace moestream
