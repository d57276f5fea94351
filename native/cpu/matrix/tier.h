// Preparation of activations, element-wise helpers, probes and the table of one instruction tier. Included last inside
// its anonymous namespace.
#include "cpu/matrix/tile_product.h"

// Position in code order of column `k`, where `step` columns are interleaved (0: natural order).
inline int64_t code_position(int64_t k, int64_t step) {
    if (step == 0) return k;
    const int64_t in = k % step;
    return k - in + in % 2 * (step / 2) + in / 2;
}

inline int64_t lane_position(int64_t position) {
    const int64_t in = position % (4 * kLanes);
    return position - in + in % 4 * kLanes + in / 4;
}

void round_group(const float* x, int group, int8_t* codes, float* scale, float* sum) {
    VF largest = zero_f();
    VF poison = zero_f();  // NaN if any value is NaN or Inf, so that the result shows it
    for (int k = 0; k < group; k += kLanes) {
        const VF v = load_f(x + k);
        largest = max_f(largest, abs_f(v));
        poison = fma_f(v, zero_f(), poison);
    }
    const float top = max_of(largest);
    const VF inverse = set_f(top > 0 ? 127.0F / top : 0.0F);
    VI total = zero_i();
    for (int k = 0; k < group; k += kLanes) {
        const VI code = round_i(mul_f(load_f(x + k), inverse));
        total = add_i(total, code);
        store_i8(codes + k, code);
    }
    *scale = top / 127.0F + sum_f(poison);
    *sum = *scale * static_cast<float>(sum_i(total));
}

void prepare(const float* x, int64_t begin, int64_t end, int bits, int group, bool exact, int8_t* codes, float* lanes,
             float* scales, float* sums) {
    const int64_t step = bits == 4 ? 8 * kLanes : 0;
    for (int64_t k = begin; k < end; k += group, x += group) {
        if (exact) {
            VF sum = zero_f();
            for (int i = 0; i < group; i += kLanes) sum = add_f(sum, load_f(x + i));
            sums[k / group] = sum_f(sum);
            for (int i = 0; i < group; ++i) lanes[lane_position(code_position(k + i, step))] = x[i];
            continue;
        }
        alignas(64) int8_t natural[128];
        round_group(x, group, natural, scales + k / group, sums + k / group);
        const int64_t chunk = step != 0 && step < group ? step : group;
        for (int64_t i = 0; i < group; i += chunk) {
            int8_t* even = codes + code_position(k + i, step);
            if (step == 0) {
                __builtin_memcpy(even, natural + i, static_cast<std::size_t>(chunk));
                continue;
            }
            for (int64_t j = 0; j < chunk / 2; ++j) {
                even[j] = natural[i + 2 * j];
                even[step / 2 + j] = natural[i + 2 * j + 1];
            }
        }
    }
}

inline float float_at(const uint8_t* p, Kind kind, int64_t index) {
    return first_f(load_floats(p + index * float_bytes(kind), kind, 1));
}

template <int Bits>
void dequantise_codes(const MatrixView& w, int64_t row, float* out) {
    const MatrixLayout& m = w.layout;
    const uint8_t* p = w.codes + row * (m.cols * Bits / 8);
    for (int64_t k = 0; k < m.cols; k += m.group) {
        const int64_t at = row * (m.cols / m.group) + k / m.group;
        const float scale = float_at(w.scales, m.scale_kind, at);
        const float bias = float_at(w.biases, m.scale_kind, at);
        for (int i = 0; i < m.group; i += 8) {
            uint64_t word = 0;
            __builtin_memcpy(&word, p, Bits);  // eight codes are Bits bytes
            p += Bits;
            for (int j = 0; j < 8; ++j) {
                const auto code = static_cast<float>((word >> (Bits * j)) & ((1U << Bits) - 1));
                out[k + i + j] = scale * code + bias;
            }
        }
    }
}

void dequantise(const MatrixView& w, int64_t row, float* out) {
    const MatrixLayout& m = w.layout;
    if (m.kind != Kind::affine) {
        const int bytes = float_bytes(m.kind);
        const uint8_t* p = w.codes + row * m.cols * bytes;
        int64_t k = 0;
        for (; k + kLanes <= m.cols; k += kLanes) store_f(out + k, load_floats(p + k * bytes, m.kind, kLanes));
        const int rest = static_cast<int>(m.cols - k);
        if (rest > 0) store_f_n(out + k, load_floats(p + k * bytes, m.kind, rest), rest);
        return;
    }
    switch (m.bits) {
        case 2:
            return dequantise_codes<2>(w, row, out);
        case 3:
            return dequantise_codes<3>(w, row, out);
        case 4:
            return dequantise_codes<4>(w, row, out);
        case 6:
            return dequantise_codes<6>(w, row, out);
        default:
            return dequantise_codes<8>(w, row, out);
    }
}

// e^x by range reduction to [-ln2/2, ln2/2] and a degree-7 Taylor polynomial, whose remainder there is below 1e-8.
inline VF exp_f(VF x) {
    x = min_f(max_f(x, set_f(-87.0F)), set_f(88.0F));
    const VI n = round_i(mul_f(x, set_f(1.44269504F)));
    VF r = fma_f(to_float(n), set_f(-0.693359375F), x);  // ln 2 in two parts; the first has few bits
    r = fma_f(to_float(n), set_f(2.12194440e-4F), r);
    VF y = set_f(1.0F / 5040);
    constexpr float kTerms[] = {1.0F / 720, 1.0F / 120, 1.0F / 24, 1.0F / 6, 0.5F, 1.0F, 1.0F};
    for (const float term : kTerms) y = fma_f(y, r, set_f(term));
    return scale_by_power(y, n);
}

void silu_mul(float* gate, const float* up, int64_t count) {
    for (int64_t k = 0; k < count; k += kLanes) {
        const int n = count - k < kLanes ? static_cast<int>(count - k) : kLanes;
        const VF g = load_f_n(gate + k, n);
        // NaN passes max/min in exp_f on some tiers only, but g itself carries it
        const VF silu = div_f(g, add_f(set_f(1.0F), exp_f(sub_f(zero_f(), g))));
        store_f_n(gate + k, mul_f(silu, load_f_n(up + k, n)), n);
    }
}

constexpr int kProbeChains = 12;

double int8_ops(int64_t rounds, float* sink) {
    VI sum[kProbeChains];
    alignas(64) int8_t ones[4 * kLanes];
    for (int8_t& one : ones) one = 1;
    VB value = load_b(ones);
    for (VI& s : sum) s = zero_i();
    for (int64_t i = 0; i < rounds; ++i)
        for (VI& s : sum) s = dot<false>(s, value, opaque(value));
    for (const VI& s : sum) *sink += sum_f(to_float(s));
    return 2.0 * static_cast<double>(rounds) * kProbeChains * 4 * kLanes;
}

double fma_ops(int64_t rounds, float* sink) {
    VF sum[kProbeChains];
    const VF value = set_f(0.5F);
    for (VF& s : sum) s = zero_f();
    for (int64_t i = 0; i < rounds; ++i)
        for (VF& s : sum) s = fma_f(value, s, value);
    for (const VF& s : sum) *sink += sum_f(s);
    return 2.0 * static_cast<double>(rounds) * kProbeChains * kLanes;
}

uint64_t stream_sum(const uint8_t* data, int64_t nbytes) {
    constexpr int kBytes = 4 * kLanes;
    constexpr int64_t kAhead = 8192;
    VI sum[8];
    for (VI& s : sum) s = zero_i();
    for (int64_t i = 0; i + 8 * kBytes <= nbytes; i += 8 * kBytes) {
        for (int j = 0; j < 8 * kBytes; j += 64) prefetch(data + i + j + kAhead);
        for (int64_t j = 0; j < 8; ++j) sum[j] = add_i(sum[j], as_i(load_b(data + i + j * kBytes)));
    }
    for (int j = 1; j < 8; ++j) sum[0] = add_i(sum[0], sum[j]);
    return static_cast<uint64_t>(static_cast<uint32_t>(sum_i(sum[0])));
}

template <int Bits>
void multiply_affine(const Product& job) {
    if (job.count > kMaxVectorRows) {
        if (job.exact) return float_product(job, pack_dequantised<Bits>);
        return code_product<Bits>(job);
    }
    if (job.exact) return affine_vector_product<Bits, true>(job);
    return affine_vector_product<Bits, false>(job);
}

template <Kind K>
void multiply_floats(const Product& job) {
    if (job.count > kMaxVectorRows) return float_product(job, pack_floats<K>);
    return float_vector_product<K>(job);
}

void multiply(const Product& job) {
    switch (job.matrix->layout.kind) {
        case Kind::bf16:
            return multiply_floats<Kind::bf16>(job);
        case Kind::f16:
            return multiply_floats<Kind::f16>(job);
        case Kind::f32:
            return multiply_floats<Kind::f32>(job);
        case Kind::affine:
            break;
    }
    switch (job.matrix->layout.bits) {
        case 2:
            return multiply_affine<2>(job);
        case 3:
            return multiply_affine<3>(job);
        case 4:
            return multiply_affine<4>(job);
        case 6:
            return multiply_affine<6>(job);
        default:
            return multiply_affine<8>(job);
    }
}

constexpr MatrixKernels kTable{multiply, prepare, dequantise, silu_mul, int8_ops, fma_ops, stream_sum};
