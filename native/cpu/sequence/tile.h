// Small matrix products on blocks that sit in L1/L2: C = diag(alpha) C + A B (see body.h for how this file is used).
#pragma once
#include "cpu/sequence/vector_math.h"

namespace moestream {
namespace {

constexpr int64_t kStrip = kTileCols * kLanes;  // columns of one panel

// A(m, k) = a[m * row + k * step]; any strides, read by broadcast.
struct Left {
    const float* a;
    int64_t row;
    int64_t step;

    Left from(int64_t m) const { return {a + m * row, row, step}; }
};

// C [Rows, kStrip] with row stride ldc; B is a panel [depth, kStrip]; alpha [Rows], or null to overwrite C.
template <int Rows>
inline void tile(int64_t depth, Left left, const float* b, float* c, int64_t ldc, const float* alpha) {
    Vec acc[Rows][kTileCols];
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < kTileCols; ++n)
            acc[m][n] = alpha ? load(c + m * ldc + n * kLanes) * broadcast(alpha[m]) : zero();
    const float* a = left.a;
    for (int64_t k = 0; k < depth; ++k, a += left.step, b += kStrip) {
        Vec right[kTileCols];
        for (int n = 0; n < kTileCols; ++n) right[n] = load(b + n * kLanes);
        for (int m = 0; m < Rows; ++m) {
            const Vec x = broadcast(a[m * left.row]);
            for (int n = 0; n < kTileCols; ++n) acc[m][n] = fma(x, right[n], acc[m][n]);
        }
    }
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < kTileCols; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
}

// Solves (I - A) X = C in place for one block of rows, given the rows before it: b is the panel that holds all of X,
// left starts at row `first`, of which columns [0, first + Rows) are read.
template <int Rows>
inline void solve_tile(int64_t first, Left left, float* b) {
    Vec acc[Rows][kTileCols];
    float* c = b + first * kStrip;
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < kTileCols; ++n) acc[m][n] = load(c + m * kStrip + n * kLanes);
    for (int64_t k = 0; k < first; ++k) {
        Vec right[kTileCols];
        for (int n = 0; n < kTileCols; ++n) right[n] = load(b + k * kStrip + n * kLanes);
        for (int m = 0; m < Rows; ++m) {
            const Vec x = broadcast(left.a[m * left.row + k * left.step]);
            for (int n = 0; n < kTileCols; ++n) acc[m][n] = fma(x, right[n], acc[m][n]);
        }
    }
    for (int m = 1; m < Rows; ++m)
        for (int k = 0; k < m; ++k) {
            const Vec x = broadcast(left.a[m * left.row + (first + k) * left.step]);
            for (int n = 0; n < kTileCols; ++n) acc[m][n] = fma(x, acc[k][n], acc[m][n]);
        }
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < kTileCols; ++n) store(c + m * kStrip + n * kLanes, acc[m][n]);
}

// Calls tile<rows> / solve_tile<rows> for rows in [1, kTileRows].
template <int Rows = kTileRows>
inline void tile_of(int64_t rows, int64_t depth, Left left, const float* b, float* c, int64_t ldc, const float* alpha) {
    if constexpr (Rows > 1)
        if (rows < Rows) return tile_of<Rows - 1>(rows, depth, left, b, c, ldc, alpha);
    tile<Rows>(depth, left, b, c, ldc, alpha);
}
template <int Rows = kTileRows>
inline void solve_tile_of(int64_t rows, int64_t first, Left left, float* b) {
    if constexpr (Rows > 1)
        if (rows < Rows) return solve_tile_of<Rows - 1>(rows, first, left, b);
    solve_tile<Rows>(first, left, b);
}

// One strip: C [rows, kStrip] = diag(alpha) C + A [rows, depth] B [depth, kStrip].
inline void multiply(int64_t rows, int64_t depth, Left left, const float* b, float* c, int64_t ldc,
                     const float* alpha) {
    for (int64_t m = 0; m < rows; m += kTileRows)
        tile_of(least(kTileRows, rows - m), depth, left.from(m), b, c + m * ldc, ldc, alpha ? alpha + m : nullptr);
}

// The same for a lower-triangular A: row m reads columns up to the end of its tile, which must hold zeros above m.
inline void multiply_lower(int64_t rows, Left left, const float* b, float* c, int64_t ldc, const float* alpha) {
    for (int64_t m = 0; m < rows; m += kTileRows)
        tile_of(least(kTileRows, rows - m), least(m + kTileRows, rows), left.from(m), b, c + m * ldc, ldc, alpha + m);
}

// One strip X [rows, kStrip] of (I - A) X = B in place, A strictly lower triangular.
inline void solve(int64_t rows, Left left, float* x) {
    for (int64_t m = 0; m < rows; m += kTileRows) solve_tile_of(least(kTileRows, rows - m), m, left.from(m), x);
}

// Rows [n, width] (row stride `stride`) as panels [ceil(width / kStrip)][n][kStrip], padded with zeros.
template <class T>
inline void pack(const T* rows, int64_t n, int64_t width, int64_t stride, float* panels) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < width; c += kStrip)
            for (int64_t j = 0; j < kStrip; j += kLanes)
                store(panels + c * n + i * kStrip + j,
                      c + j < width ? load_row(rows + i * stride, c + j, width) : zero());
}

// The transpose of rows [n, width]: panels [ceil(n / kStrip)][width][kStrip], padded with zeros.
template <class T>
inline void pack_transposed(const T* rows, int64_t n, int64_t width, int64_t stride, float* panels) {
    for (int64_t i = 0; i < n; i += kStrip)
        for (int64_t j = 0; j < kStrip; j += kLanes)
            for (int64_t c = 0; c < width; c += kLanes) {
                Vec block[kLanes];
                for (int64_t r = 0; r < kLanes; ++r)
                    block[r] = i + j + r < n ? load_row(rows + (i + j + r) * stride, c, width) : zero();
                transpose(block);
                for (int64_t r = 0; r < least(kLanes, width - c); ++r)
                    store(panels + i * width + (c + r) * kStrip + j, block[r]);
            }
}

}  // namespace
}  // namespace moestream
