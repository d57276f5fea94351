// Products with many activation rows: a tile of matrix rows is unpacked once into a panel that stays in cache and is
// multiplied with every activation row. Included inside the anonymous namespace of one instruction tier.
//
// A panel holds two vectors (kTile matrix rows) per step of the inner loop; activations are broadcast.
#include "cpu/matrix/vector_product.h"

constexpr int kTile = 2 * kLanes;
constexpr int kCodeBlock = 1024;  // columns of a panel: with int8 codes it fills half to two thirds of the L1 cache
constexpr int kFloatBlock = 512;
constexpr int kMinGroup = 32;

struct ScalePanel {
    alignas(64) float scales[kCodeBlock / kMinGroup][kTile];
    alignas(64) float biases[kCodeBlock / kMinGroup][kTile];
};

// Scales and biases of `groups` groups from `group0` on, transposed to [group][row]; rows past `rows` are zero.
void pack_scales(const MatrixView& w, int64_t row0, int rows, int64_t group0, int groups, ScalePanel& panel) {
    const int64_t stride = w.layout.cols / w.layout.group;
    const int64_t bytes = float_bytes(w.layout.scale_kind);
    for (int half = 0; half < 2; ++half)
        for (int g = 0; g < groups; g += kLanes) {
            const int n = groups - g < kLanes ? groups - g : kLanes;
            VF scales[kLanes];
            VF biases[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                scales[l] = biases[l] = zero_f();
                if (half * kLanes + l >= rows) continue;
                const int64_t at = ((row0 + half * kLanes + l) * stride + group0 + g) * bytes;
                scales[l] = load_floats(w.scales + at, w.layout.scale_kind, n);
                biases[l] = load_floats(w.biases + at, w.layout.scale_kind, n);
                prefetch_far(w.scales + at + kTile * stride * bytes);  // the next tile's
                prefetch_far(w.biases + at + kTile * stride * bytes);
            }
            transpose_f(scales);
            transpose_f(biases);
            for (int i = 0; i < n; ++i) {
                store_f(&panel.scales[g + i][half * kLanes], scales[i]);
                store_f(&panel.biases[g + i][half * kLanes], biases[i]);
            }
        }
}

// One step of kLanes matrix rows transposed: lanes are rows, vector j holds code word j. Rows past `rows` are zero.
template <int Bits>
inline void load_transposed(const MatrixView& w, int64_t row0, int rows, int64_t column, int64_t columns, VB* words) {
    using C = Codes<Bits>;
    const int64_t row_bytes = w.layout.cols * Bits / 8;
    const uint8_t* p = w.codes + row0 * row_bytes + column * Bits / 8;
    for (int l = 0; l < kLanes; ++l, p += row_bytes) {
        if (l >= rows)
            words[l] = zero_b();
        else if (columns >= C::kColumns)
            words[l] = C::load(p);
        else
            words[l] = C::load_n(p, static_cast<int>(columns * Bits / 8));
    }
    transpose_b(words);
}

// Fetches what the next panel will be packed from, a few lines with every group that is multiplied: all at once would
// stall on the number of reads a core can have in flight.
class Ahead {
public:
    // `steps` calls to step() are to come.
    Ahead(const MatrixView& w, int bits, int64_t row, int64_t column, int64_t block, int64_t steps)
        : from_(w.codes + row * (w.layout.cols * bits / 8) + column * bits / 8),
          stride_(w.layout.cols * bits / 8),
          lines_((w.layout.cols - column < block ? w.layout.cols - column : block) * bits / 8 / 64 + 1),
          per_step_((kTile * lines_ + steps - 1) / steps) {}

    // No branch depends on the position: one that did would be mispredicted at every line's end.
    void step() {
        for (int64_t i = 0; i < per_step_; ++i, ++next_) {
            const int64_t line = next_ / kTile;
            prefetch_far(from_ + next_ % kTile * stride_ + (line < lines_ ? line : 0) * 64);
        }
    }

private:
    const uint8_t* from_;
    int64_t stride_;
    int64_t lines_;
    int64_t per_step_;
    int64_t next_ = 0;
};

// A tile of codes as they are stored, transposed: [word of a row][row][4 bytes].
struct CodePanel {
    alignas(64) uint8_t words[kCodeBlock * kTile];
    ScalePanel groups;
};

template <int Bits>
void pack_codes(const MatrixView& w, int64_t row0, int rows, int64_t column, int64_t columns, CodePanel& panel) {
    using C = Codes<Bits>;
    for (int half = 0; half < 2; ++half) {
        uint8_t* out = panel.words + half * 4 * kLanes;
        for (int64_t k = 0; k < columns; k += C::kColumns) {
            VB words[kLanes];
            load_transposed<Bits>(w, row0 + half * kLanes, rows - half * kLanes, column + k, columns - k, words);
            for (int j = 0; j < kLanes; ++j, out += 4 * kTile) store_b(out, words[j]);
        }
    }
}

// Activation rows are packed in sets of this many, so that what one step of the inner loop broadcasts is adjacent.
constexpr int kSet = kLanes > kTileRows ? kLanes : kTileRows;
constexpr int kMaxSets = 256 / kSet;  // packed at once; they stay in the L2 cache while panels pass by

struct RowSet {
    alignas(64) int8_t codes[kCodeBlock * kSet];  // [word of a matrix row][code vector of a word][row][4]
    alignas(64) float scales[kCodeBlock / kMinGroup][kSet];
    alignas(64) float sums[kCodeBlock / kMinGroup][kSet];
};

// Columns [column, column + columns) of `rows` rows of activations; rows past them are zero.
template <int Bits>
void pack_rows(const Line* x, int rows, int64_t column, int64_t columns, int group, RowSet& set) {
    using C = Codes<Bits>;
    const int64_t group0 = column / group;
    const int groups = static_cast<int>(columns / group);
    for (int part = 0; part < kSet; part += kLanes) {
        int8_t* out = set.codes + part * 4;
        for (int64_t k = 0; k < columns; k += C::kColumns)
            for (int v = 0; v < C::kVectors; ++v) {
                VB words[kLanes];
                for (int l = 0; l < kLanes; ++l)
                    words[l] = part + l < rows ? load_b(x[part + l].codes + column + k + v * 4 * kLanes) : zero_b();
                transpose_b(words);
                for (int j = 0; j < kLanes; ++j)
                    store_b(out + ((k / C::kColumns * kLanes + j) * C::kVectors + v) * 4 * kSet, words[j]);
            }
        for (int g = 0; g < groups; g += kLanes) {
            const int n = groups - g < kLanes ? groups - g : kLanes;
            VF scales[kLanes];
            VF sums[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                const bool real = part + l < rows;
                scales[l] = real ? load_f_n(x[part + l].scales + group0 + g, n) : zero_f();
                sums[l] = real ? load_f_n(x[part + l].sums + group0 + g, n) : zero_f();
            }
            transpose_f(scales);
            transpose_f(sums);
            for (int i = 0; i < n; ++i) {
                store_f(&set.scales[g + i][part], scales[i]);
                store_f(&set.sums[g + i][part], sums[i]);
            }
        }
    }
}

// R rows of a set from `row` on times a panel; added to what `out` holds unless `first`.
template <int Bits, int R>
void code_block(const CodePanel& panel, int groups, int group, const RowSet& set, int row, float* const* out, int width,
                bool first, Ahead& ahead) {
    using C = Codes<Bits>;
    VF acc[R][2];
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) acc[r][h] = first ? zero_f() : load_f_n(out[r] + h * kLanes, width - h * kLanes);
    const uint8_t* words = panel.words;
    const int8_t* x = set.codes + row * 4;
    for (int g = 0; g < groups; ++g) {
        VI sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero_i();
        ahead.step();
        for (int j = 0; j < group; j += 4 * C::kVectors) {
            VB codes[2][C::kVectors];
            for (int h = 0; h < 2; ++h) C::split(load_b(words + h * 4 * kLanes), codes[h]);
            words += 4 * kTile;
            for (int v = 0; v < C::kVectors; ++v, x += 4 * kSet)
                for (int r = 0; r < R; ++r) {
                    const VB value = broadcast_word(x + 4 * r);
                    for (int h = 0; h < 2; ++h) sum[r][h] = dot < Bits == 8 > (sum[r][h], codes[h][v], value);
                }
        }
        for (int h = 0; h < 2; ++h) {
            const VF scale = load_f(&panel.groups.scales[g][h * kLanes]);
            const VF bias = load_f(&panel.groups.biases[g][h * kLanes]);
            for (int r = 0; r < R; ++r) {
                const VF factor = mul_f(scale, set_f(set.scales[g][row + r]));
                acc[r][h] = fma_f(bias, set_f(set.sums[g][row + r]), acc[r][h]);
                acc[r][h] = fma_f(to_float(sum[r][h]), factor, acc[r][h]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) store_f_n(out[r] + h * kLanes, acc[r][h], width - h * kLanes);
}

struct FloatPanel {
    alignas(64) float values[kFloatBlock][kTile];
    ScalePanel groups;
};

template <Kind K>
void pack_floats(const MatrixView& w, int64_t row0, int rows, int64_t column, int64_t columns, FloatPanel& panel) {
    constexpr int kBytes = float_bytes(K);
    for (int half = 0; half < 2; ++half)
        for (int64_t k = 0; k < columns; k += kLanes) {
            const int n = columns - k < kLanes ? static_cast<int>(columns - k) : kLanes;
            VF values[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                const int row = half * kLanes + l;
                values[l] = row < rows
                                ? load_floats(w.codes + ((row0 + row) * w.layout.cols + column + k) * kBytes, K, n)
                                : zero_f();
            }
            transpose_f(values);
            for (int i = 0; i < kLanes; ++i) store_f(&panel.values[k + i][half * kLanes], values[i]);
        }
}

template <int Bits>
void pack_dequantised(const MatrixView& w, int64_t row0, int rows, int64_t column, int64_t columns, FloatPanel& panel) {
    using C = Codes<Bits>;
    const int shift = log2_of(w.layout.group);
    pack_scales(w, row0, rows, column >> shift, static_cast<int>(columns >> shift), panel.groups);
    for (int half = 0; half < 2; ++half)
        for (int64_t k = 0; k < columns; k += C::kColumns) {
            VB words[kLanes];
            load_transposed<Bits>(w, row0 + half * kLanes, rows - half * kLanes, column + k, columns - k, words);
            for (int j = 0; j < kLanes; ++j) {
                VB codes[C::kVectors];
                C::split(words[j], codes);
                for (int v = 0; v < C::kVectors; ++v) {
                    VF values[4];
                    expand(codes[v], values);
                    for (int m = 0; m < 4; ++m) {
                        const int64_t at = k + C::kVectors * (4 * j + m) + v;
                        if (at >= columns) continue;
                        const VF scale = load_f(&panel.groups.scales[at >> shift][half * kLanes]);
                        const VF bias = load_f(&panel.groups.biases[at >> shift][half * kLanes]);
                        store_f(&panel.values[at][half * kLanes], fma_f(values[m], scale, bias));
                    }
                }
            }
        }
}

template <int R>
void float_block(const FloatPanel& panel, int64_t columns, int64_t column, const Line* x, float* const* out, int width,
                 bool first) {
    VF acc[R][2];
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) acc[r][h] = first ? zero_f() : load_f_n(out[r] + h * kLanes, width - h * kLanes);
    for (int64_t k = 0; k < columns; ++k) {
        const VF w0 = load_f(&panel.values[k][0]);
        const VF w1 = load_f(&panel.values[k][kLanes]);
        for (int r = 0; r < R; ++r) {
            const VF value = set_f(x[r].values[column + k]);
            acc[r][0] = fma_f(w0, value, acc[r][0]);
            acc[r][1] = fma_f(w1, value, acc[r][1]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) store_f_n(out[r] + h * kLanes, acc[r][h], width - h * kLanes);
}

// Calls block(std::integral_constant-like R, first row) over `count` rows in nearly equal blocks of at most kTileRows.
template <int R>
struct Rows {
    static constexpr int value = R;
};

template <int R, class Block>
inline void with_rows(int rows, Block&& block) {
    if constexpr (R == 1) {
        block(Rows<1>{});
    } else if (rows == R) {
        block(Rows<R>{});
    } else {
        with_rows<R - 1>(rows, block);
    }
}

constexpr int row_blocks(int count) { return (count + kTileRows - 1) / kTileRows; }

template <class Block>
inline void over_rows(const Product& job, int64_t tile, Block&& block) {
    const int blocks = row_blocks(job.count);
    for (int b = 0; b < blocks; ++b) {
        const int begin = static_cast<int>(static_cast<int64_t>(job.count) * b / blocks);
        const int end = static_cast<int>(static_cast<int64_t>(job.count) * (b + 1) / blocks);
        Line x[kTileRows] = {};
        float* out[kTileRows] = {};
        for (int t = begin; t < end; ++t) {
            x[t - begin] = line_of(*job.x, job.x_rows != nullptr ? job.x_rows[t] : t);
            out[t - begin] =
                job.out + (job.out_rows != nullptr ? job.out_rows[t] : t) * job.out_stride + (tile - job.begin);
        }
        with_rows<kTileRows>(end - begin, [&](auto rows) { block(rows, x, out); });
    }
}

struct CodeScratch {
    CodePanel panel;
    RowSet sets[kMaxSets];
};
thread_local CodeScratch code_scratch;  // too large for the stacks that some systems give threads

// What is packed after a tile: the next one, the first one of the next columns, or the next product's.
template <int Bits>
Ahead after_tile(const Product& job, int64_t tile, int64_t column, int64_t steps) {
    if (tile + kTile < job.end) return {*job.matrix, Bits, tile + kTile, column, kCodeBlock, steps};
    if (column + kCodeBlock < job.matrix->layout.cols)
        return {*job.matrix, Bits, job.begin, column + kCodeBlock, kCodeBlock, steps};
    if (job.end < job.limit) return {*job.matrix, Bits, job.end, 0, kCodeBlock, steps};
    if (job.next != nullptr && job.next->layout.kind == Kind::affine)
        return {*job.next, job.next->layout.bits, job.next_row, 0, kCodeBlock, steps};
    return {*job.matrix, Bits, job.begin, job.matrix->layout.cols, kCodeBlock, steps};
}

// Rows [first, first + count) of a product, at most kMaxSets * kSet.
template <int Bits>
void code_rows(const Product& job, int first, int count) {
    const MatrixView& w = *job.matrix;
    const int group = w.layout.group;
    CodePanel& panel = code_scratch.panel;
    RowSet* sets = code_scratch.sets;
    const int set_count = (count + kSet - 1) / kSet;
    auto start = [&](int set) { return count * set / set_count; };
    for (int64_t column = 0; column < w.layout.cols; column += kCodeBlock) {
        const int64_t columns = w.layout.cols - column < kCodeBlock ? w.layout.cols - column : kCodeBlock;
        const int64_t group0 = column / group;
        const int groups = static_cast<int>(columns / group);
        int blocks = 0;
        for (int s = 0; s < set_count; ++s) {
            Line x[kSet] = {};
            const int rows = start(s + 1) - start(s);
            for (int t = 0; t < rows; ++t) {
                const int at = first + start(s) + t;
                x[t] = line_of(*job.x, job.x_rows != nullptr ? job.x_rows[at] : at);
            }
            pack_rows<Bits>(x, rows, column, columns, group, sets[s]);
            blocks += row_blocks(rows);
        }
        for (int64_t tile = job.begin; tile < job.end; tile += kTile) {
            const int width = job.end - tile < kTile ? static_cast<int>(job.end - tile) : kTile;
            pack_codes<Bits>(w, tile, width, column, columns, panel);
            pack_scales(w, tile, width, group0, groups, panel.groups);
            Ahead ahead = after_tile<Bits>(job, tile, column, static_cast<int64_t>(groups) * blocks);
            for (int s = 0; s < set_count; ++s) {
                const int rows = start(s + 1) - start(s);
                const int parts = row_blocks(rows);
                for (int b = 0; b < parts; ++b) {
                    const int begin = rows * b / parts;
                    const int end = rows * (b + 1) / parts;
                    float* out[kTileRows] = {};
                    for (int t = begin; t < end; ++t) {
                        const int at = first + start(s) + t;
                        out[t - begin] = job.out + (job.out_rows != nullptr ? job.out_rows[at] : at) * job.out_stride +
                                         (tile - job.begin);
                    }
                    with_rows<kTileRows>(end - begin, [&](auto r) {
                        code_block<Bits, decltype(r)::value>(panel, groups, group, sets[s], begin, out, width,
                                                             column == 0, ahead);
                    });
                }
            }
        }
    }
}

template <int Bits>
void code_product(const Product& job) {
    constexpr int kRows = kMaxSets * kSet;
    const int passes = (job.count + kRows - 1) / kRows;
    for (int p = 0; p < passes; ++p) {
        const int first = static_cast<int>(static_cast<int64_t>(job.count) * p / passes);
        const int end = static_cast<int>(static_cast<int64_t>(job.count) * (p + 1) / passes);
        Product pass = job;
        if (p + 1 < passes) {  // the same matrix rows follow
            pass.limit = job.end;
            pass.next = job.matrix;
            pass.next_row = job.begin;
        }
        code_rows<Bits>(pass, first, end - first);
    }
}

template <class Pack>
void float_product(const Product& job, Pack&& pack) {
    const MatrixView& w = *job.matrix;
    FloatPanel panel;
    for (int64_t tile = job.begin; tile < job.end; tile += kTile) {
        const int width = job.end - tile < kTile ? static_cast<int>(job.end - tile) : kTile;
        for (int64_t column = 0; column < w.layout.cols; column += kFloatBlock) {
            const int64_t columns = w.layout.cols - column < kFloatBlock ? w.layout.cols - column : kFloatBlock;
            pack(w, tile, width, column, columns, panel);
            over_rows(job, tile, [&](auto rows, const Line* x, float* const* out) {
                float_block<decltype(rows)::value>(panel, columns, column, x, out, width, column == 0);
            });
        }
    }
}
