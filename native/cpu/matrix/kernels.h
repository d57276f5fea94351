// What one instruction tier provides for encoded matrices, and the plain structs its kernels take.
//
// Shape letters: N rows and K columns of a matrix, G = K / group, T activation rows.
//
// Code order: kernels read codes without rearranging them, so activations are rearranged once instead. With `lanes`
// float lanes per vector, 4-bit codes come in steps of 8 * lanes columns, even columns first (low nibbles), then odd
// ones; all other widths keep the natural order. Lane order (exact mode) is code order with each run of 4 * lanes
// values transposed to [4][lanes]: value 4 * l + m of the run lies at m * lanes + l.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moestream {

enum class Kind : uint8_t { affine, bf16, f16, f32 };

struct MatrixLayout {
    int64_t rows;
    int64_t cols;
    Kind kind;
    Kind scale_kind;  // bf16, f16 or f32; affine only
    int bits;         // affine only
    int group;        // affine only
};

// Parts of a matrix at any alignment. Kernels never read outside them.
struct MatrixView {
    MatrixLayout layout;
    const uint8_t* codes;   // affine: packed codes [N, K * bits / 8]; floats: the values [N, K]
    const uint8_t* scales;  // [N, G], affine only
    const uint8_t* biases;  // [N, G], affine only
};

// Columns and groups of a row of activations are padded with zeros to these multiples.
constexpr int64_t kPadColumns = 128;
constexpr int64_t kPadGroups = 16;

// An input in every form the kernels may ask for; forms not needed are null.
struct Activations {
    const float* values = nullptr;  // [T, value_stride], as given
    const int8_t* codes = nullptr;  // [T, code_stride], rounded, in code order
    const float* lanes = nullptr;   // [T, code_stride], exact, in lane order
    const float* scales = nullptr;  // [T, group_stride], value of one code unit
    const float* sums = nullptr;    // [T, group_stride], sum over a group of what codes or lanes stand for
    int64_t value_stride = 0;
    int64_t code_stride = 0;
    int64_t group_stride = 0;
};

// out[t, n] = sum_k w[begin + n, k] * x[t, k] for n < end - begin and t < count.
struct Product {
    const MatrixView* matrix;
    int64_t begin, end;
    const Activations* x;
    const int32_t* x_rows;  // row of x that t stands for; null: t itself
    int count;
    float* out;
    int64_t out_stride;
    const int32_t* out_rows;  // row of out that t stands for; null: t itself
    bool exact;
    // Where reading goes on after row `limit` of the matrix: what the same thread multiplies next. Only a hint.
    int64_t limit;
    const MatrixView* next;  // may be null
    int64_t next_row;
};

// Up to this many activation rows a product reads codes straight from memory; above it, unpacks tiles.
constexpr int kMaxVectorRows = 3;

struct MatrixKernels {
    void (*multiply)(const Product&);
    // Writes columns [begin, end) of one row, whole groups, in the forms of `exact` or fast mode. `x` points at column
    // `begin`; the outputs point at the start of their rows, unused ones may be null.
    void (*prepare)(const float* x, int64_t begin, int64_t end, int bits, int group, bool exact, int8_t* codes,
                    float* lanes, float* scales, float* sums);
    void (*dequantise)(const MatrixView&, int64_t row, float* out);
    void (*silu_mul)(float* gate, const float* up, int64_t count);  // gate = silu(gate) * up
    // Probes: operations (a multiply and an add are two) done by a loop of the tier's best instruction.
    double (*int8_ops)(int64_t rounds, float* sink);
    double (*fma_ops)(int64_t rounds, float* sink);
    uint64_t (*stream_sum)(const uint8_t* data, int64_t nbytes);
};

// The table of the active tier (cpu/isa.h).
const MatrixKernels& matrix_kernels();

const MatrixKernels& matrix_kernels_portable();
#if defined(__x86_64__)
const MatrixKernels& matrix_kernels_avx2();
const MatrixKernels& matrix_kernels_avx512();
#elif defined(__aarch64__)
const MatrixKernels& matrix_kernels_neon();
#endif

}  // namespace moestream
