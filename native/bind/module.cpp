// The extension module. Each part of the native code binds itself; only policy-free bytes and flops live here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bind/bind.h"
#include "cpu/isa.h"
#include "cpu/pool.h"

namespace nb = nanobind;
using namespace moestream;

NB_MODULE(_native, m) {
    m.doc() = "Native reader and CPU kernels of moestream";
    m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
    m.def("supported_isas", [] {
        std::vector<std::string> names;
        const IsaList list = supported_isas();
        for (int i = 0; i < list.count; ++i) names.emplace_back(isa_name(list.tiers[i]));
        return names;
    });
    m.def("set_active_isa", [](const std::string& name) { set_active_isa(name); }, nb::arg("name"));
    m.def(
        "set_threads", [](int threads) { pool().resize(threads); }, nb::arg("threads"),
        nb::call_guard<nb::gil_scoped_release>());
    m.def("threads", [] { return pool().size(); });
    bind_io(m);
    bind_matrix(m);
    bind_sequence(m);
    bind_steps(m);
}
