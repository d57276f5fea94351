#include "cpu/steps.h"

#include "cpu/matrix/products.h"
#include "cpu/sequence/sequence.h"

namespace moestream {
namespace {

// Intermediate values of a step; it only grows.
struct Workspace {
    Input input;
    Buffer<float> normed;
    Buffer<float> mixed;
    Buffer<float> projected[4];
};

Workspace& workspace() {
    thread_local Workspace space;
    return space;
}

// norm(x) times some matrices; the results are valid until the next call.
void project(Workspace& space, const float* x, const float* norm, float eps, int64_t rows, bool exact,
             const MatrixView* const* matrices, int count, float** outs) {
    const int64_t hidden = matrices[0]->layout.cols;
    float* normed = space.normed.resize(rows * hidden);
    rms_norm(x, norm, eps, rows, hidden, normed);
    space.input.bind(normed, rows, hidden, exact);
    Target targets[4];
    for (int i = 0; i < count; ++i) {
        outs[i] = space.projected[i].resize(rows * matrices[i]->layout.rows);
        targets[i] = {matrices[i], outs[i]};
    }
    linear(space.input, targets, count);
}

// out = x + mixed W^T
void put_onto(Workspace& space, const float* x, const float* mixed, int64_t rows, bool exact, const MatrixView& matrix,
              float* out) {
    space.input.bind(mixed, rows, matrix.layout.cols, exact);
    const Target target{&matrix, out};
    linear(space.input, &target, 1);
    add(x, rows * matrix.layout.rows, out);
}

}  // namespace

void AttentionStep::run(const float* x, std::vector<AttentionArgs>& sequences, bool exact, float* out) const {
    if (sequences.empty()) return;
    Workspace& space = workspace();
    const auto rows = static_cast<int64_t>(sequences.size());
    const MatrixView* matrices[] = {&q, &k, &v};
    float* qkv[3];
    project(space, x, norm, sequences[0].eps, rows, exact, matrices, 3, qkv);
    float* mixed = space.mixed.resize(rows * o.layout.cols);
    for (int64_t i = 0; i < rows; ++i) {
        AttentionArgs& args = sequences[i];
        args.q = qkv[0] + i * q.layout.rows;
        args.k = qkv[1] + i * k.layout.rows;
        args.v = qkv[2] + i * v.layout.rows;
        args.out = mixed + i * o.layout.cols;
        attention(args);
    }
    put_onto(space, x, mixed, rows, exact, o, out);
}

void DeltaNetStep::run(const float* x, std::vector<DeltaNetArgs>& sequences, bool exact, float* out) const {
    if (sequences.empty()) return;
    Workspace& space = workspace();
    const auto rows = static_cast<int64_t>(sequences.size());
    const MatrixView* matrices[] = {&u, &z, &b, &a};
    float* inputs[4];
    project(space, x, norm, sequences[0].eps, rows, exact, matrices, 4, inputs);
    float* mixed = space.mixed.resize(rows * out_proj.layout.cols);
    for (int64_t i = 0; i < rows; ++i) {
        DeltaNetArgs& args = sequences[i];
        args.u = inputs[0] + i * u.layout.rows;
        args.z = inputs[1] + i * z.layout.rows;
        args.b = inputs[2] + i * b.layout.rows;
        args.a = inputs[3] + i * a.layout.rows;
        args.out = mixed + i * out_proj.layout.cols;
        delta_net(args);
    }
    put_onto(space, x, mixed, rows, exact, out_proj, out);
}

void RouteStep::run(const float* x, int64_t rows, int64_t k, bool exact, float* normed, int32_t* ids, float* weights,
                    float* gate) const {
    Workspace& space = workspace();
    rms_norm(x, norm, eps, rows, router.layout.cols, normed);
    space.input.bind(normed, rows, router.layout.cols, exact);
    float* logits = space.projected[0].resize(rows * router.layout.rows);
    const Target targets[] = {{&router, logits}, {shared_gate, gate}};
    linear(space.input, targets, shared_gate != nullptr ? 2 : 1);
    route(logits, rows, router.layout.rows, k, renormalise, ids, weights);
}

}  // namespace moestream
