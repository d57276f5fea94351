// The kernels, written once over the tier's Vec. Each tier's file defines Vec, IntVec, the tile constants and the
// primitives, then includes this. Everything sits in an anonymous namespace and no std template is used, so that no
// symbol compiled with one tier's flags can be picked by the linker for another.
#pragma once
#include "cpu/sequence/body_attention.h"
#include "cpu/sequence/body_delta_net.h"
#include "cpu/sequence/body_rows.h"

namespace moestream {
namespace {

constexpr SequenceKernels kTable = {
    rms_norm, route, combine, attention_prepare, attention_partial, attention_finish, delta_prepare, delta_head,
};

}  // namespace
}  // namespace moestream
