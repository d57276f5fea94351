// Ways to multiply a 4-bit affine matrix (group 64, value = scale * code + bias) by one vector in float32.
//
// The same unpacking, the same loads, the same accumulators: only the arithmetic of the inner loop differs.
//   naive     acc += (code * scale + bias) * x      multiply, add, multiply, add, as written
//   fused     acc = fma(fma(code, scale, bias), x)  what a compiler makes of it where it may contract
//   flashmoe  acc += fma(code, scale * x, bias * x) Flash-MoE's rearrangement
//   factored  acc += scale * sum(code * x), and bias * sum(x) with the sums of x taken once for all rows
//
// Build: c++ -O3 -std=c++17 -march=native -ffp-contract=off -pthread. Usage: dequantise_kernels THREADS KILOBYTES
// ROUNDS Prints one line a round and variant: name and GB/s of codes, scales and biases. Order alternates between
// rounds.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__FMA__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

constexpr int kGroup = 64, kHalf = kGroup / 2, kVecs = kHalf / kWidth, kCols = 4096, kGroups = kCols / kGroup;
constexpr size_t kRowBytes = kCols / 2 + 2 * 2 * kGroups;

static inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

static inline Vec widen(Bytes codes) { return __builtin_convertvector(__builtin_convertvector(codes, Ints), Vec); }
static inline float bf16(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// Activations of even and odd columns apart, in the order in which nibbles come out; and their sum per group.
struct Input {
    alignas(64) float even[kCols / 2], odd[kCols / 2], sum[kGroups];
    explicit Input(const std::vector<float>& x) {
        for (int i = 0; i < kCols / 2; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
        for (int g = 0; g < kGroups; ++g) {
            sum[g] = 0;
            for (int i = 0; i < kGroup; ++i) sum[g] += x[g * kGroup + i];
        }
    }
};

enum Variant { naive, fused, flashmoe, factored };
constexpr const char* kNames[] = {"naive", "fused", "flashmoe", "factored"};

// One row: [kCols / 2 bytes of codes | kGroups scales | kGroups biases], bf16.
template <Variant V>
static float dot(const uint8_t* row, const Input& in) {
    const auto* scales = reinterpret_cast<const uint16_t*>(row + kCols / 2);
    const uint16_t* biases = scales + kGroups;
    Vec acc[2 * kVecs] = {};
    float tail = 0;
    for (int g = 0; g < kGroups; ++g) {
        const float s = bf16(scales[g]), b = bf16(biases[g]);
        const Vec scale = Vec{} + s, bias = Vec{} + b;
        Vec part[2] = {};
        for (int v = 0; v < kVecs; ++v) {
            Bytes raw;
            std::memcpy(&raw, row + g * kHalf + v * kWidth, kWidth);
            for (int odd = 0; odd < 2; ++odd) {
                const Vec code = widen(odd ? raw >> 4 : raw & 15);
                const Vec x = *reinterpret_cast<const Vec*>((odd ? in.odd : in.even) + g * kHalf + v * kWidth);
                Vec& sum = acc[2 * v + odd];
                if constexpr (V == naive) sum = sum + (code * scale + bias) * x;
                if constexpr (V == fused) sum = fma(fma(code, scale, bias), x, sum);
                if constexpr (V == flashmoe) sum = sum + fma(code, scale * x, bias * x);
                if constexpr (V == factored) part[odd] = fma(code, x, part[odd]);
            }
        }
        if constexpr (V == factored) {
            acc[0] = fma(scale, part[0], acc[0]);
            acc[1] = fma(scale, part[1], acc[1]);
            tail += b * in.sum[g];
        }
    }
    Vec all = {};
    for (const Vec& v : acc) all += v;
    for (int i = 0; i < kWidth; ++i) tail += all[i];
    return tail;
}

template <Variant V>
static void rows(const uint8_t* matrix, size_t first, size_t last, const Input& in, float* out) {
    for (size_t r = first; r < last; ++r) out[r] = dot<V>(matrix + r * kRowBytes, in);
}

using Kernel = void (*)(const uint8_t*, size_t, size_t, const Input&, float*);
constexpr Kernel kKernels[] = {rows<naive>, rows<fused>, rows<flashmoe>, rows<factored>};

// GB/s of repeated passes over the matrix for about 0.15 s, each thread on rows of its own.
static double rate(Kernel kernel, const uint8_t* matrix, size_t count, int threads, const Input& in, float* out) {
    const int passes = std::max<int>(1, int(3e9 / double(count * kRowBytes)));
    auto work = [&](int t) {
        for (int p = 0; p < passes; ++p) kernel(matrix, count * t / threads, count * (t + 1) / threads, in, out);
    };
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (auto& other : others) other.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    return double(passes) * double(count * kRowBytes) / took.count() / 1e9;
}

int main(int argc, char** argv) {
    if (argc != 4) return std::fprintf(stderr, "usage: %s THREADS KILOBYTES ROUNDS\n", argv[0]), 2;
    const int threads = std::atoi(argv[1]), rounds = std::atoi(argv[3]);
    const size_t count = std::max<size_t>(threads, std::atoll(argv[2]) * 1000 / kRowBytes);
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t nbytes = (count * kRowBytes + kHuge - 1) / kHuge * kHuge;
    auto* matrix = static_cast<uint8_t*>(std::aligned_alloc(kHuge, nbytes));
#if defined(__linux__)
    madvise(matrix, nbytes, MADV_HUGEPAGE);
#endif
    uint32_t state = 1;
    auto next = [&] { return state = state * 1664525u + 1013904223u, state >> 16; };
    for (size_t r = 0; r < count; ++r) {
        uint8_t* row = matrix + r * kRowBytes;
        for (int i = 0; i < kCols / 2; ++i) row[i] = uint8_t(next());
        auto* scales = reinterpret_cast<uint16_t*>(row + kCols / 2);
        for (int g = 0; g < kGroups; ++g) scales[g] = uint16_t(0x3c00 | (next() & 127)), scales[kGroups + g] = 0xbd80;
    }
    std::vector<float> x(kCols);
    for (float& v : x) v = float(next() % 2001) / 1000 - 1;
    const Input in(x);

    std::vector<std::vector<float>> out(4, std::vector<float>(count));
    for (int v = 0; v < 4; ++v) kKernels[v](matrix, 0, count, in, out[v].data());
    for (int v = 1; v < 4; ++v)
        for (size_t r = 0; r < count; ++r)
            if (std::fabs(out[v][r] - out[0][r]) > 1e-3f) return std::fprintf(stderr, "%s differs\n", kNames[v]), 1;

    for (int n = 0; n < rounds; ++n)
        for (int i = 0; i < 4; ++i) {
            const int v = n % 2 ? 3 - i : i;
            std::printf("%s %.3f\n", kNames[v], rate(kKernels[v], matrix, count, threads, in, out[v].data()));
        }
    return 0;
}
