// The reader as Python sees it. experts/reader.py wraps it with names, errors and lifetimes.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <system_error>
#include <tuple>

#include "bind/bind.h"
#include "io/reader.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace moestream {
namespace {

using Ranges = nb::ndarray<const int64_t, nb::shape<-1, 5>, nb::c_contig, nb::device::cpu>;
using FailureTuple = std::tuple<int64_t, int, int64_t, int64_t>;
using NoGil = nb::call_guard<nb::gil_scoped_release>;

// The rows of a batch are read as Range structs in place.
static_assert(sizeof(Range) == 5 * sizeof(int64_t));

std::tuple<std::vector<int64_t>, std::vector<FailureTuple>> wait(Reader& reader, int64_t min_count, double timeout) {
    Completions result;
    {
        nb::gil_scoped_release release;
        result = reader.wait(min_count, timeout);
    }
    std::vector<FailureTuple> failed;
    for (const Failure& f : result.failed) failed.emplace_back(f.ticket, f.error, f.file, f.offset);
    return {std::move(result.done), std::move(failed)};
}

void submit(Reader& reader, const Ranges& ranges, bool prefetch) {
    reader.submit(reinterpret_cast<const Range*>(ranges.data()), static_cast<int64_t>(ranges.shape(0)), prefetch);
}

}  // namespace

void bind_io(nb::module_& m) {
    nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
        try {
            std::rethrow_exception(pointer);
        } catch (const std::system_error& e) {
            errno = e.code().value();
            PyErr_SetFromErrno(PyExc_OSError);
        }
    });
    nb::class_<ReaderCounters>(m, "ReaderCounters")
        .def_ro("bytes_asked", &ReaderCounters::bytes_asked)
        .def_ro("bytes_disk", &ReaderCounters::bytes_disk)
        .def_ro("bytes_cached", &ReaderCounters::bytes_cached)
        .def_ro("reads", &ReaderCounters::reads)
        .def_ro("errors", &ReaderCounters::errors)
        .def_ro("busy_seconds", &ReaderCounters::busy_seconds);
    nb::class_<Reader>(m, "Reader")
        .def(nb::init<int>(), "threads"_a)
        .def("open", &Reader::open, "path"_a, "direct"_a)
        .def("size", &Reader::size, "file"_a)
        .def("is_direct", &Reader::is_direct, "file"_a)
        .def("attach", &Reader::attach, "address"_a, "nbytes"_a)
        .def("detach", &Reader::detach, "address"_a)
        .def("submit", &submit, "ranges"_a, "prefetch"_a)
        .def("limit_prefetch", &Reader::limit_prefetch, "reads"_a)
        .def("wait", &wait, "min_count"_a, "timeout"_a)
        .def("promote", &Reader::promote, "tickets"_a)
        .def("cancel", &Reader::cancel, "tickets"_a, NoGil())
        .def("cancel_prefetch", &Reader::cancel_prefetch, NoGil())
        .def("outstanding", &Reader::outstanding)
        .def("counters", &Reader::counters)
        .def("close", &Reader::close, NoGil());
    m.def("probe_read", &probe_read, "path"_a, "block"_a, "seconds"_a, "direct"_a, "threads"_a, NoGil());
}

}  // namespace moestream
