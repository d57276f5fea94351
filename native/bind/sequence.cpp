// Python face of cpu/sequence: checks shapes, then runs without the GIL.
#include "cpu/sequence/sequence.h"

#include <nanobind/stl/optional.h>

#include <optional>
#include <string>

#include "bind/bind.h"
#include "bind/sequence.h"

namespace nb = nanobind;

namespace moestream {
namespace {

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
    AttentionArgs args = attention_constants(q_norm, k_norm, heads, kv_heads, head_dim, rotary_dim, gated, eps);
    args.tokens = rows_of(q, "q");
    expect(q, "q", {args.tokens, heads * head_dim * (gated ? 2 : 1)});
    expect(k, "k", {args.tokens, kv_heads * head_dim});
    expect(v, "v", {args.tokens, kv_heads * head_dim});
    expect(cos, "cos", {args.tokens, rotary_dim / 2});
    expect(sin, "sin", {args.tokens, rotary_dim / 2});
    expect(out, "out", {args.tokens, heads * head_dim});
    use_cache(cache_k, cache_v, length, args);
    args.q = q.data();
    args.k = k.data();
    args.v = v.data();
    args.cos = cos.data();
    args.sin = sin.data();
    args.out = out.data();
    nb::gil_scoped_release release;
    attention(args);
}

void bind_delta_net(const In& u, const In& z, const In& b, const In& a, const In& conv, const In& neg_exp_a,
                    const In& dt_bias, const In& norm, const Out& state_conv, const Out& state_s, int64_t key_heads,
                    int64_t value_heads, int64_t key_dim, int64_t value_dim, float eps, const Out& out) {
    DeltaNetArgs args =
        delta_net_constants(conv, neg_exp_a, dt_bias, norm, key_heads, value_heads, key_dim, value_dim, eps);
    args.tokens = rows_of(u, "u");
    expect(u, "u", {args.tokens, args.channels()});
    expect(z, "z", {args.tokens, value_heads * value_dim});
    expect(b, "b", {args.tokens, value_heads});
    expect(a, "a", {args.tokens, value_heads});
    expect(out, "out", {args.tokens, value_heads * value_dim});
    use_state(state_conv, state_s, args);
    args.u = u.data();
    args.z = z.data();
    args.b = b.data();
    args.a = a.data();
    args.out = out.data();
    nb::gil_scoped_release release;
    delta_net(args);
}

}  // namespace

AttentionArgs attention_constants(const In& q_norm, const In& k_norm, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                  int64_t rotary_dim, bool gated, float eps) {
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "heads must be a positive multiple of kv_heads");
    require(head_dim > 0 && head_dim <= kMaxHeadDim, "head_dim must be between 1 and 1024");
    require(rotary_dim >= 0 && rotary_dim <= head_dim && rotary_dim % 2 == 0,
            "rotary_dim must be even and at most head_dim");
    expect(q_norm, "q_norm", {head_dim});
    expect(k_norm, "k_norm", {head_dim});
    AttentionArgs args{};
    args.q_norm = q_norm.data();
    args.k_norm = k_norm.data();
    args.heads = heads;
    args.kv_heads = kv_heads;
    args.head_dim = head_dim;
    args.rotary_dim = rotary_dim;
    args.eps = eps;
    args.gated = gated;
    return args;
}

void use_cache(const OutAny& cache_k, const OutAny& cache_v, int64_t length, AttentionArgs& args) {
    require(cache_k.ndim() == 3, "cache.k must be [kv_heads, capacity, head_dim]");
    args.past = length;
    args.capacity = static_cast<int64_t>(cache_k.shape(1));
    expect(cache_k, "cache.k", {args.kv_heads, args.capacity, args.head_dim});
    expect(cache_v, "cache.v", {args.kv_heads, args.capacity, args.head_dim});
    const nb::dlpack::dtype type = cache_k.dtype();
    require(type == cache_v.dtype() && type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) &&
                (type.bits == 16 || type.bits == 32),
            "cache.k and cache.v must both be float32 or both float16");
    if (length < 0 || length > args.capacity - args.tokens)
        fail("the cache holds " + std::to_string(length) + " of " + std::to_string(args.capacity) +
             " tokens, no room for " + std::to_string(args.tokens) + " more");
    args.cache_k = cache_k.data();
    args.cache_v = cache_v.data();
    args.half = type.bits == 16;
}

DeltaNetArgs delta_net_constants(const In& conv, const In& neg_exp_a, const In& dt_bias, const In& norm,
                                 int64_t key_heads, int64_t value_heads, int64_t key_dim, int64_t value_dim,
                                 float eps) {
    require(key_heads > 0 && value_heads > 0 && value_heads % key_heads == 0,
            "value_heads must be a positive multiple of key_heads");
    require(key_dim > 0 && value_dim > 0, "key_dim and value_dim must be positive");
    rows_of(conv, "conv");
    DeltaNetArgs args{};
    args.key_heads = key_heads;
    args.value_heads = value_heads;
    args.key_dim = key_dim;
    args.value_dim = value_dim;
    args.width = static_cast<int64_t>(conv.shape(1));
    args.eps = eps;
    require(args.width > 0 && args.width <= kMaxConvWidth, "conv must have 1 to 16 columns");
    expect(conv, "conv", {args.channels(), args.width});
    expect(neg_exp_a, "neg_exp_a", {value_heads});
    expect(dt_bias, "dt_bias", {value_heads});
    expect(norm, "norm", {value_dim});
    args.conv = conv.data();
    args.neg_exp_a = neg_exp_a.data();
    args.dt_bias = dt_bias.data();
    args.norm = norm.data();
    return args;
}

void use_state(const Out& conv, const Out& s, DeltaNetArgs& args) {
    expect(conv, "state.conv", {args.width - 1, args.channels()});
    expect(s, "state.s", {args.value_heads, args.key_dim, args.value_dim});
    args.state_conv = conv.data();
    args.state_s = s.data();
}

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
