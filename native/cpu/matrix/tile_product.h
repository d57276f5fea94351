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

// Where the activations of a group lie in code order: two runs of group / 2 columns, `second` columns apart.
struct GroupOrder {
    int64_t step;   // columns of a step of interleaved codes; 0: natural order
    int64_t group;  // columns
    int64_t second;

    GroupOrder(int columns, bool interleaved, int group_columns)
        : step(interleaved && group_columns < columns ? columns : 0),
          group(group_columns),
          second(step != 0 ? step / 2 : group / 2) {}

    int64_t position(int64_t index) const {
        if (step == 0) return index * group;
        const int64_t per_step = step / group;
        return index / per_step * step + index % per_step * (group / 2);
    }
};

// Fetches what the next panel will be packed from, a few lines with every group that is multiplied: all at once would
// stall on the number of reads a core can have in flight.
class Ahead {
public:
    // `steps` calls to step() are to come.
    Ahead(const MatrixView& w, int bits, int64_t row, int64_t column, int64_t block, int64_t steps)
        : row_(w.codes + row * (w.layout.cols * bits / 8) + column * bits / 8),
          stride_(w.layout.cols * bits / 8),
          lines_((w.layout.cols - column < block ? w.layout.cols - column : block) * bits / 8 / 64 + 1),
          left_(kTile * lines_),
          per_step_((left_ + steps - 1) / steps) {}

    void step() {
        for (int64_t i = 0; i < per_step_ && left_ > 0; ++i, --left_) {
            prefetch_far(row_ + line_ * 64);
            if (++line_ == lines_) {
                line_ = 0;
                row_ += stride_;
            }
        }
    }

private:
    const uint8_t* row_;
    int64_t stride_;
    int64_t lines_;
    int64_t left_;
    int64_t per_step_;
    int64_t line_ = 0;
};

struct CodePanel {
    alignas(64) uint8_t codes[kCodeBlock * kTile];  // [word of 4 columns, grouped][row][4]
    ScalePanel groups;
};

// Where each code vector of a step goes, in words: group after group, in each the even columns before the odd ones.
template <int Bits>
struct WordOrder {
    int at[Codes<Bits>::kVectors][kLanes];

    explicit WordOrder(int group) {
        using C = Codes<Bits>;
        const int run = C::kVectors == 2 && group < C::kColumns ? group / 8 : kLanes;
        for (int v = 0; v < C::kVectors; ++v)
            for (int j = 0; j < kLanes; ++j) at[v][j] = j / run * C::kVectors * run + v * run + j % run;
    }
};

template <int Bits>
void pack_codes(const MatrixView& w, int64_t row0, int rows, int64_t column, int64_t columns,
                const WordOrder<Bits>& order, CodePanel& panel) {
    using C = Codes<Bits>;
    constexpr int kWord = 4 * kTile;  // bytes of a word of all rows
    for (int half = 0; half < 2; ++half)
        for (int64_t k = 0; k < columns; k += C::kColumns) {
            VB words[kLanes];
            load_transposed<Bits>(w, row0 + half * kLanes, rows - half * kLanes, column + k, columns - k, words);
            uint8_t* out = panel.codes + k / 4 * kWord + half * 4 * kLanes;
            for (int j = 0; j < kLanes; ++j) {
                VB codes[C::kVectors];
                C::split(words[j], codes);
                for (int v = 0; v < C::kVectors; ++v) store_b(out + order.at[v][j] * kWord, codes[v]);
            }
        }
}

// `rows` of the output from column 0 of the tile on, `width` columns; added to what is there unless `first`.
template <bool Wide, int R>
void code_block(const CodePanel& panel, int groups, const GroupOrder& order, int64_t group0, const Line* x,
                float* const* out, int width, bool first, Ahead& ahead) {
    VF acc[R][2];
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) acc[r][h] = first ? zero_f() : load_f_n(out[r] + h * kLanes, width - h * kLanes);
    const uint8_t* words = panel.codes;
    for (int g = 0; g < groups; ++g) {
        const int64_t position = order.position(group0 + g);
        VI sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero_i();
        ahead.step();
        for (int64_t run = 0; run < 2; ++run) {
            const int64_t from = position + run * order.second;
            for (int64_t j = 0; j < order.group / 2; j += 4) {
                const VB w0 = load_b(words);
                const VB w1 = load_b(words + 4 * kLanes);
                words += 2 * 4 * kLanes;
                for (int r = 0; r < R; ++r) {
                    const VB value = broadcast_word(x[r].codes + from + j);
                    sum[r][0] = dot<Wide>(sum[r][0], w0, value);
                    sum[r][1] = dot<Wide>(sum[r][1], w1, value);
                }
            }
        }
        for (int h = 0; h < 2; ++h) {
            const VF scale = load_f(&panel.groups.scales[g][h * kLanes]);
            const VF bias = load_f(&panel.groups.biases[g][h * kLanes]);
            for (int r = 0; r < R; ++r) {
                const VF factor = mul_f(scale, set_f(x[r].scales[group0 + g]));
                acc[r][h] = fma_f(bias, set_f(x[r].sums[group0 + g]), acc[r][h]);
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

template <int Bits>
void code_product(const Product& job) {
    const MatrixView& w = *job.matrix;
    const GroupOrder order(Codes<Bits>::kColumns, Codes<Bits>::kVectors == 2, w.layout.group);
    const WordOrder<Bits> words(w.layout.group);
    CodePanel panel;
    for (int64_t tile = job.begin; tile < job.end; tile += kTile) {
        const int width = job.end - tile < kTile ? static_cast<int>(job.end - tile) : kTile;
        for (int64_t column = 0; column < w.layout.cols; column += kCodeBlock) {
            const int64_t columns = w.layout.cols - column < kCodeBlock ? w.layout.cols - column : kCodeBlock;
            const int64_t group0 = column / w.layout.group;
            const int groups = static_cast<int>(columns / w.layout.group);
            pack_codes<Bits>(w, tile, width, column, columns, words, panel);
            pack_scales(w, tile, width, group0, groups, panel.groups);
            const int64_t next = column + kCodeBlock < w.layout.cols ? column + kCodeBlock : 0;
            Ahead ahead(w, Bits, next == 0 ? tile + kTile : tile, next, kCodeBlock,
                        static_cast<int64_t>(groups) * row_blocks(job.count));
            over_rows(job, tile, [&](auto rows, const Line* x, float* const* out) {
                code_block<Bits == 8, decltype(rows)::value>(panel, groups, order, group0, x, out, width, column == 0,
                                                             ahead);
            });
        }
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
