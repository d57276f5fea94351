#pragma once
#include <nanobind/nanobind.h>

namespace moestream {

void bind_io(nanobind::module_& m);        // io.cpp: the reader
void bind_matrix(nanobind::module_& m);    // matrix.cpp: everything that multiplies by an encoded matrix
void bind_sequence(nanobind::module_& m);  // sequence.cpp: norms, routing, attention, gated delta-net
void bind_steps(nanobind::module_& m);     // steps.cpp: what a layer does to one new token, in one call

}  // namespace moestream
