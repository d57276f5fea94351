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

constexpr int64_t kPrefetchBytes = 8192;

constexpr int float_bytes(Kind kind) { return kind == Kind::f32 ? 4 : 2; }

constexpr int log2_of(int v) { return v <= 1 ? 0 : 1 + log2_of(v / 2); }

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

// R matrix rows from `row` on, times T activation rows.
template <int Bits, bool Exact, int R, int T>
inline void affine_rows(const MatrixView& w, int64_t row, const Line* x, float (*out)[T]) {
    using C = Codes<Bits>;
    constexpr int kChains = T == 1 ? 2 : 1;  // with one activation row, sums in turn so that they need not wait
    const int group = w.layout.group;
    const int64_t groups = w.layout.cols / group;
    const int64_t row_bytes = w.layout.cols * Bits / 8;
    const int64_t scale_bytes = float_bytes(w.layout.scale_kind);
    const int shift = log2_of(group / (C::kColumns / kLanes));
    // Rows follow each other in memory: a whole number of blocks of R rows ahead is what comes next there.
    const int64_t ahead = (kPrefetchBytes / (R * row_bytes) + 1) * R;
    VF acc[kChains][R][T];
    for (auto& chain : acc)
        for (auto& rows : chain)
            for (VF& sum : rows) sum = zero_f();

    const uint8_t* p = w.codes + row * row_bytes;
    int64_t position = 0;
    for (int64_t g = 0; g < groups; g += kLanes) {
        const int n = groups - g < kLanes ? static_cast<int>(groups - g) : kLanes;
        VF factor[R][T];
        for (int r = 0; r < R; ++r) {
            const int64_t at = ((row + r) * groups + g) * scale_bytes;
            const VF scale = load_floats(w.scales + at, w.layout.scale_kind, n);
            const VF bias = load_floats(w.biases + at, w.layout.scale_kind, n);
            prefetch(w.scales + at + ahead * groups * scale_bytes);
            prefetch(w.biases + at + ahead * groups * scale_bytes);
            for (int t = 0; t < T; ++t) {
                acc[0][r][t] = fma_f(bias, load_f(x[t].sums + g), acc[0][r][t]);
                factor[r][t] = Exact ? scale : mul_f(scale, load_f(x[t].scales + g));
            }
        }
        Counter counter = first_step();
        auto step = [&](int chain, auto&& load) {
            for (int r = 0; r < R; ++r) {
                VB codes[C::kVectors];
                C::split(load(p + r * row_bytes), codes);
                for (int t = 0; t < T; ++t)
                    acc[chain][r][t] = fma_f(dot_step<Bits, Exact>(codes, x[t], position),
                                             spread(factor[r][t], counter, shift), acc[chain][r][t]);
            }
            p += C::kBytes;
            position += C::kColumns;
            counter = next_step(counter);
        };
        auto whole = [&](const uint8_t* from) {
            prefetch(from + ahead * row_bytes);
            return C::load(from);
        };
        const int64_t columns = static_cast<int64_t>(n) * group;
        const int full = static_cast<int>(columns / C::kColumns);
        int u = 0;
        for (; u + kChains <= full; u += kChains)
            for (int chain = 0; chain < kChains; ++chain) step(chain, whole);
        for (; u < full; ++u) step(0, whole);
        if (const int64_t rest = columns - static_cast<int64_t>(full) * C::kColumns; rest > 0)
            step(0, [&](const uint8_t* from) { return C::load_n(from, static_cast<int>(rest * Bits / 8)); });
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            VF sum = acc[0][r][t];
            for (int chain = 1; chain < kChains; ++chain) sum = add_f(sum, acc[chain][r][t]);
            out[r][t] = sum_f(sum);
        }
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

// Runs Rows<R>::apply over a product's matrix rows. One activation row is bound by memory, which is read fastest in
// one stream; with more, several matrix rows share what is done to the activations.
template <class Rows, int T>
void vector_product(const Product& job) {
    constexpr int kTogether = T == 1 ? 1 : kVectorRows;
    Line x[T];
    float* out[T];
    for (int t = 0; t < T; ++t) {
        x[t] = line_of(*job.x, job.x_rows != nullptr ? job.x_rows[t] : t);
        out[t] = job.out + (job.out_rows != nullptr ? job.out_rows[t] : t) * job.out_stride - job.begin;
    }
    int64_t row = job.begin;
    float result[kTogether][T];
    for (; row + kTogether <= job.end; row += kTogether) {
        Rows::template apply<kTogether, T>(*job.matrix, row, x, result);
        for (int r = 0; r < kTogether; ++r)
            for (int t = 0; t < T; ++t) out[t][row + r] = result[r][t];
    }
    for (; row < job.end; ++row) {
        Rows::template apply<1, T>(*job.matrix, row, x, result);
        for (int t = 0; t < T; ++t) out[t][row] = result[0][t];
    }
}

template <int Bits, bool Exact>
struct AffineRows {
    template <int R, int T>
    static void apply(const MatrixView& w, int64_t row, const Line* x, float (*out)[T]) {
        affine_rows<Bits, Exact, R, T>(w, row, x, out);
    }
};

template <Kind K>
struct FloatRows {
    template <int R, int T>
    static void apply(const MatrixView& w, int64_t row, const Line* x, float (*out)[T]) {
        float_rows<K, R, T>(w, row, x, out);
    }
};

template <class Rows>
void vector_product_of(const Product& job) {
    switch (job.count) {
        case 1:
            return vector_product<Rows, 1>(job);
        case 2:
            return vector_product<Rows, 2>(job);
        default:
            return vector_product<Rows, 3>(job);
    }
}
