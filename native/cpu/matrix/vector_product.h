// Products with few activation rows: codes go from memory to the dot product once, never through a buffer.
// Included inside the anonymous namespace of one instruction tier, after its vector operations.
//
//   sum_k (s q_k + b) x_k = s sum_k q_k x_k + b sum_k x_k    per group; scale and bias stay out of the inner loop.

// Scales of `n` groups as floats, zeros after them.
inline VF load_floats(const uint8_t* p, Kind kind, int n) {
    if (kind == Kind::bf16) return n == kLanes ? load_bf16(p) : load_bf16_n(p, n);
    if (kind == Kind::f16) return n == kLanes ? load_f16(p) : load_f16_n(p, n);
    return n == kLanes ? load_f32(p) : load_f32_n(p, n);
}

// The same of R rows `stride` bytes apart.
template <int R>
inline void load_rows(const uint8_t* p, int64_t stride, Kind kind, int n, VF* out) {
    if (kind == Kind::bf16 && n == kLanes) {  // the usual kind: one branch for all rows
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) out[r] = load_bf16(p + r * stride);
    } else if (kind == Kind::bf16) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) out[r] = load_bf16_n(p + r * stride, n);
    } else {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) out[r] = load_floats(p + r * stride, kind, n);
    }
}

// Into the first cache: Intel gives non-temporal prefetches half the bandwidth of a Xeon, AMD makes no difference.
constexpr int64_t kPrefetchBytes = 4096;

constexpr int float_bytes(Kind kind) { return kind == Kind::f32 ? 4 : 2; }

constexpr int log2_of(int v) { return v <= 1 ? 0 : 1 + log2_of(v / 2); }

template <int N>
struct Constant {
    static constexpr int value = N;
};

// One row of activations.
struct Line {
    const float* values;
    const int8_t* codes;
    const float* lanes;
    const float* scales;
    const float* sums;
};

Line line_of(const Activations& x, int64_t row) {
    Line line{};
    if (x.values != nullptr) line.values = x.values + row * x.value_stride;
    if (x.codes != nullptr) line.codes = x.codes + row * x.code_stride;
    if (x.lanes != nullptr) line.lanes = x.lanes + row * x.code_stride;
    if (x.scales != nullptr) line.scales = x.scales + row * x.group_stride;
    if (x.sums != nullptr) line.sums = x.sums + row * x.group_stride;
    return line;
}

// Codes of one step times activations, per lane; exact: float32, otherwise int8 with int32 sums.
template <int Bits, bool Exact>
inline VF dot_step(const VB* codes, const Line& x, int64_t position) {
    constexpr int kVectors = Codes<Bits>::kVectors;
    if constexpr (Exact) {
        VF sum = zero_f();
        for (int v = 0; v < kVectors; ++v) {
            VF expanded[4];
            expand(codes[v], expanded);
            for (int m = 0; m < 4; ++m)
                sum = fma_f(expanded[m], load_f(x.lanes + position + v * 4 * kLanes + m * kLanes), sum);
        }
        return sum;
    } else {
        VI sum = zero_i();
        for (int v = 0; v < kVectors; ++v)
            sum = dot < Bits == 8 > (sum, codes[v], load_b(x.codes + position + v * 4 * kLanes));
        return to_float(sum);
    }
}

// What a block of matrix rows asks memory for while it is multiplied: the rows that come after it.
struct Upcoming {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* biases;
};

// What is the same for every row of an affine matrix.
struct AffineShape {
    int64_t groups;       // of a row
    int64_t row_bytes;    // of codes
    int64_t scale_bytes;  // of a row's scales, and of its biases
    int64_t ahead;        // rows between a row and the one to ask for, a multiple of those multiplied together
    int shift;            // lanes of a step to groups

    template <int Bits>
    static AffineShape of(const MatrixLayout& m) {
        constexpr int kTogether = affine_together(Bits);
        const int64_t groups = m.cols / m.group, row_bytes = m.cols * Bits / 8;
        return {groups, row_bytes, groups * float_bytes(m.scale_kind),
                (kPrefetchBytes / (kTogether * row_bytes) + 1) * kTogether,
                log2_of(m.group / (Codes<Bits>::kColumns / kLanes))};
    }
};

// R matrix rows from `row` on, times T activation rows. Rows share what is loaded of the activations.
template <int Bits, bool Exact, int R, int T>
inline void affine_rows(const MatrixView& w, const AffineShape& shape, int64_t row, Upcoming next, const Line* x,
                        float (*out)[T]) {
    using C = Codes<Bits>;
    constexpr int kLines =
        (R * C::kBytes + 63) / 64;  // memory is asked for in its own order, whatever order rows are read in
    const Kind kind = w.layout.scale_kind;
    const int64_t row_bytes = shape.row_bytes;
    VF acc[R][T];  // loops over it are unrolled by pragma: early enough that it stays in registers throughout
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[r][t] = zero_f();
    for (int64_t line = 0; line < R * shape.scale_bytes; line += 64) {
        prefetch(next.scales + line);
        prefetch(next.biases + line);
    }
    const uint8_t* p = w.codes + row * row_bytes;
    const uint8_t* scales = w.scales + row * shape.scale_bytes;
    const uint8_t* biases = w.biases + row * shape.scale_bytes;
    int64_t position = 0;
    for (int64_t g = 0; g < shape.groups; g += kLanes) {
        const int n = shape.groups - g < kLanes ? static_cast<int>(shape.groups - g) : kLanes;
        VF scale[R];
        VF bias[R];
        load_rows<R>(scales + g * float_bytes(kind), shape.scale_bytes, kind, n, scale);
        load_rows<R>(biases + g * float_bytes(kind), shape.scale_bytes, kind, n, bias);
        VF factor[R][T];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                acc[r][t] = fma_f(bias[r], load_f(x[t].sums + g), acc[r][t]);
                factor[r][t] = Exact ? scale[r] : mul_f(scale[r], load_f(x[t].scales + g));
            }
        Counter counter = first_step();
        auto step = [&](auto&& load) {
            for (int line = 0; line < kLines; ++line) prefetch(next.codes + line * 64);
            next.codes += R * C::kBytes;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                VB codes[C::kVectors];
                C::split(load(p + r * row_bytes), codes);
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t)
                    acc[r][t] = fma_f(dot_step<Bits, Exact>(codes, x[t], position),
                                      spread(factor[r][t], counter, shape.shift), acc[r][t]);
            }
            p += C::kBytes;
            position += C::kColumns;
            counter = next_step(counter);
        };
        const int64_t columns = static_cast<int64_t>(n) * w.layout.group;
        const int full = static_cast<int>(columns / C::kColumns);
        for (int u = 0; u < full; ++u) step([](const uint8_t* from) { return C::load(from); });
        if (const int64_t rest = columns - static_cast<int64_t>(full) * C::kColumns; rest > 0)
            step([&](const uint8_t* from) { return C::load_n(from, static_cast<int>(rest * Bits / 8)); });
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) out[r][t] = sum_f(acc[r][t]);
}

template <Kind K, int R, int T>
inline void float_rows(const MatrixView& w, int64_t row, const Line* x, float (*out)[T]) {
    constexpr int kBytes = float_bytes(K);
    constexpr int kChains = T == 1 ? 4 : 1;
    const int64_t cols = w.layout.cols;
    const int64_t ahead = (kPrefetchBytes / (R * cols * kBytes) + 1) * R * cols * kBytes;
    const uint8_t* p = w.codes + row * cols * kBytes;
    VF acc[kChains][R][T];
    for (auto& chain : acc)
        for (auto& rows : chain)
            for (VF& sum : rows) sum = zero_f();
    auto step = [&](int chain, int64_t k) {
        for (int r = 0; r < R; ++r) {
            const uint8_t* from = p + (r * cols + k) * kBytes;
            prefetch(from + ahead);
            const VF v = load_floats(from, K, kLanes);
            for (int t = 0; t < T; ++t) acc[chain][r][t] = fma_f(v, load_f(x[t].values + k), acc[chain][r][t]);
        }
    };
    int64_t k = 0;
    for (; k + kChains * kLanes <= cols; k += kChains * kLanes)
        for (int chain = 0; chain < kChains; ++chain) step(chain, k + chain * kLanes);
    for (; k + kLanes <= cols; k += kLanes) step(0, k);
    if (k < cols) {
        const int n = static_cast<int>(cols - k);
        for (int r = 0; r < R; ++r) {
            const VF v = load_floats(p + (r * cols + k) * kBytes, K, n);
            for (int t = 0; t < T; ++t) acc[0][r][t] = fma_f(v, load_f_n(x[t].values + k, n), acc[0][r][t]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            VF sum = acc[0][r][t];
            for (int chain = 1; chain < kChains; ++chain) sum = add_f(sum, acc[chain][r][t]);
            out[r][t] = sum_f(sum);
        }
}

// Where a product's activations come from and its results go.
template <int T>
struct Ends {
    Line x[T];
    float* out[T];

    explicit Ends(const Product& job) {
        for (int t = 0; t < T; ++t) {
            x[t] = line_of(*job.x, job.x_rows != nullptr ? job.x_rows[t] : t);
            out[t] = job.out + (job.out_rows != nullptr ? job.out_rows[t] : t) * job.out_stride - job.begin;
        }
    }
};

// Row `row` of the matrix, or of what follows it.
inline Upcoming upcoming(const Product& job, const AffineShape& shape, int64_t row) {
    const MatrixView& w = row < job.limit || job.next == nullptr ? *job.matrix : *job.next;
    if (row >= job.limit) row = job.next == nullptr ? job.begin : row - job.limit + job.next_row;
    return {w.codes + row * shape.row_bytes, w.scales + row * shape.scale_bytes, w.biases + row * shape.scale_bytes};
}

template <int Bits, bool Exact, int T>
void affine_vectors(const Product& job) {
    constexpr int kTogether = affine_together(Bits);
    const MatrixView& w = *job.matrix;
    const AffineShape shape = AffineShape::of<Bits>(w.layout);
    Ends<T> ends(job);
    float result[kTogether][T];
    auto block = [&](auto rows, int64_t row) {
        constexpr int R = decltype(rows)::value;
        affine_rows<Bits, Exact, R, T>(w, shape, row, upcoming(job, shape, row + shape.ahead), ends.x, result);
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) ends.out[t][row + r] = result[r][t];
    };
    int64_t row = job.begin;
    for (; row + kTogether <= job.end; row += kTogether) block(Constant<kTogether>{}, row);
    for (; row < job.end; ++row) block(Constant<1>{}, row);
}

// One activation row is bound by memory, which is read fastest in one stream; with more, several matrix rows share
// what is done to the activations.
template <Kind K, int T>
void float_vectors(const Product& job) {
    constexpr int kTogether = T == 1 ? 1 : kVectorRows;
    Ends<T> ends(job);
    int64_t row = job.begin;
    float result[kTogether][T];
    for (; row + kTogether <= job.end; row += kTogether) {
        float_rows<K, kTogether, T>(*job.matrix, row, ends.x, result);
        for (int r = 0; r < kTogether; ++r)
            for (int t = 0; t < T; ++t) ends.out[t][row + r] = result[r][t];
    }
    for (; row < job.end; ++row) {
        float_rows<K, 1, T>(*job.matrix, row, ends.x, result);
        for (int t = 0; t < T; ++t) ends.out[t][row] = result[0][t];
    }
}

template <int Bits, bool Exact>
void affine_vector_product(const Product& job) {
    switch (job.count) {
        case 1:
            return affine_vectors<Bits, Exact, 1>(job);
        case 2:
            return affine_vectors<Bits, Exact, 2>(job);
        case 3:
            return affine_vectors<Bits, Exact, 3>(job);
        default:  // no rows
            return;
    }
}

template <Kind K>
void float_vector_product(const Product& job) {
    switch (job.count) {
        case 1:
            return float_vectors<K, 1>(job);
        case 2:
            return float_vectors<K, 2>(job);
        case 3:
            return float_vectors<K, 3>(job);
        default:  // no rows
            return;
    }
}
