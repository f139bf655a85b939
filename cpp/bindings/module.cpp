// SPDX-License-Identifier: MIT
// The content of a module: constants, errors, threads, and the functions of the files bind_*.cpp.
#include "define.hpp"
#include "dlnfast/build_info.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/recorders.hpp"
#include "dlnfast/threads.hpp"

namespace dlnfast::python {
namespace {

template <std::size_t n>
py::tuple names(const char* const (&list)[n]) {
  return py::tuple(py::cast(std::vector<std::string>(list, list + n)));
}

void export_constants(py::module_& m) {
  m.attr("TRACKING_COLUMNS") = names(tracking_column_names);
  m.attr("OUTCOMES") = names(outcome_names);
  m.attr("TIERS") = names(tier_names);
  m.attr("COMPLETENESS") = names(completeness_names);
  m.attr("TRACKER_MODES") = names(tracker_mode_names);
  m.attr("TRACKER_DEFAULTS") = to_python(TrackerSettings());
  m.attr("SMALL_LIMIT") = small_limit;
  m.attr("LARGEST_FULL_SIZE") = largest_full_size;
  m.attr("LARGEST_CERTIFIED_SIZE") = largest_certified_size;
  m.attr("POLL_SECONDS") = Monitor::poll_seconds;
  const py::object make = py::module_::import("enum").attr("IntEnum");
  m.attr("Count") = make("Count", names(count_names), py::arg("start") = 0);
}

}  // namespace
}  // namespace dlnfast::python

PYBIND11_MODULE(bindings, m) {
  using namespace dlnfast::python;
  m.doc() = "The compiled core of dlnfast. Use the functions of the package dlnfast instead.";
  export_constants(m);
  bind_kernels(m);
  bind_svd_tracker(m);
  bind_descent(m);
  m.def(
      "build_info", [] { return to_python(dlnfast::build_info()); }, "How this module was built.");
  m.def("set_num_threads", &dlnfast::set_num_threads, py::arg("n"),
        "Default team size; 0: OpenMP's own.");
  m.def("max_threads", &dlnfast::max_threads, "Team size of a call that asks for 0 threads.");
  m.def("forbid_threads", &dlnfast::forbid_threads, "One thread from here on (in a forked child).");
}
