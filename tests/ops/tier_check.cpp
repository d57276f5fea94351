// Compares the NEON tier with the portable one where Python cannot run: on another machine through an emulator.
//
//   aarch64-linux-gnu-g++ -std=c++20 -O2 -ffp-contract=off -march=armv8.2-a+dotprod+fp16 -static -I native
//       tests/ops/tier_check.cpp native/cpu/matrix/{neon,portable,input}.cpp native/cpu/{isa,pool}.cpp -o check
//   qemu-aarch64-static ./check
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "cpu/matrix/input.h"

using namespace moestream;

namespace {

std::mt19937 random_bits(1);

// A matrix whose parts start one byte behind any alignment and end at the end of their allocations.
struct Case {
    std::vector<std::vector<uint8_t>> parts;
    MatrixView view{};

    explicit Case(const MatrixLayout& m) {
        view.layout = m;
        if (m.kind != Kind::affine) {
            view.codes = floats(m.rows * m.cols, m.kind);
            return;
        }
        std::vector<uint8_t> codes(static_cast<size_t>(m.rows * m.cols * m.bits / 8 + 1));
        for (auto& byte : codes) byte = static_cast<uint8_t>(random_bits());
        parts.push_back(std::move(codes));
        view.codes = parts.back().data() + 1;
        view.scales = floats(m.rows * m.cols / m.group, m.scale_kind);
        view.biases = floats(m.rows * m.cols / m.group, m.scale_kind);
    }

    const uint8_t* floats(int64_t count, Kind kind) {
        std::normal_distribution<float> normal(0, 0.1F);
        const size_t bytes = kind == Kind::f32 ? 4 : 2;
        std::vector<uint8_t> out(static_cast<size_t>(count) * bytes + 1);
        for (int64_t i = 0; i < count; ++i) {
            const float value = normal(random_bits);
            uint8_t* to = out.data() + 1 + static_cast<size_t>(i) * bytes;
            if (kind == Kind::f32) std::memcpy(to, &value, 4);
            if (kind == Kind::bf16) std::memcpy(to, reinterpret_cast<const char*>(&value) + 2, 2);
            if (kind == Kind::f16) {
                const __fp16 half = static_cast<__fp16>(value);
                std::memcpy(to, &half, 2);
            }
        }
        parts.push_back(std::move(out));
        return parts.back().data() + 1;
    }
};

std::vector<float> product(const char* tier, const MatrixView& w, const std::vector<float>& x, int count, bool exact) {
    set_active_isa(tier);
    Input input;
    input.bind(x.data(), count, w.layout.cols, exact);
    std::vector<float> out(static_cast<size_t>(count * w.layout.rows));
    matrix_kernels().multiply(Product{&w, 0, w.layout.rows, &input.for_layout(w.layout), nullptr, count, out.data(),
                                      w.layout.rows, nullptr, exact});
    return out;
}

int failures = 0;

void expect_close(const std::vector<float>& a, const std::vector<float>& b, double limit, const char* what,
                  const MatrixLayout& m, int count) {
    double worst = 0;
    double norm = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        worst = std::fmax(worst, std::fabs(a[i] - b[i]));
        norm = std::fmax(norm, std::fabs(a[i]));
    }
    if (worst <= limit * norm && norm > 0) return;
    ++failures;
    std::printf("%s: kind %d bits %d group %d, [%d, %d] x %d rows: off by %g of %g\n", what, static_cast<int>(m.kind),
                m.bits, m.group, static_cast<int>(m.rows), static_cast<int>(m.cols), count, worst, norm);
}

void check(const MatrixLayout& m) {
    const Case c(m);
    std::normal_distribution<float> normal;
    for (const int count : {1, 2, 3, 4, 13, 33}) {
        std::vector<float> x(static_cast<size_t>(count * m.cols));
        for (float& v : x) v = normal(random_bits);
        for (const bool exact : {true, false})
            expect_close(product("portable", c.view, x, count, exact), product("neon", c.view, x, count, exact), 2e-5,
                         exact ? "exact product" : "fast product", m, count);
    }
    std::vector<float> a(static_cast<size_t>(m.cols));
    std::vector<float> b(a.size());
    matrix_kernels_portable().dequantise(c.view, m.rows - 1, a.data());
    matrix_kernels_neon().dequantise(c.view, m.rows - 1, b.data());
    expect_close(a, b, 0, "dequantise", m, 1);
}

}  // namespace

int main() {
    for (const int bits : {2, 3, 4, 6, 8})
        for (const int group : {32, 64, 128})
            for (const Kind kind : {Kind::bf16, Kind::f16, Kind::f32})
                for (const int groups : {1, 3, 19})
                    check({group == 32 ? 37 : 6, groups * group, Kind::affine, kind, bits, group});
    for (const Kind kind : {Kind::bf16, Kind::f16, Kind::f32})
        for (const int cols : {7, 64, 517}) check({37, cols, kind, Kind::f32, 0, 0});
    std::vector<float> gate(1001);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = static_cast<float>(i) * 0.2F - 100.0F;
    const std::vector<float> up = gate;
    std::vector<float> other = gate;
    matrix_kernels_portable().silu_mul(gate.data(), up.data(), 1001);
    matrix_kernels_neon().silu_mul(other.data(), up.data(), 1001);
    for (size_t i = 0; i < gate.size(); ++i)
        if (std::fabs(gate[i] - other[i]) > 1e-6F * std::fabs(gate[i])) ++failures;
    std::printf("%d failures\n", failures);
    return failures != 0;
}
