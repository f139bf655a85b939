// SPDX-License-Identifier: MIT
#include <exception>

#include "bindings.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/threads.hpp"
#include "tables.hpp"

namespace dlnfast::python {
namespace {

// A value of the wrong type in a dictionary is an argument like any other: a TypeError.
void translate(std::exception_ptr failure) {
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const py::cast_error& error) {
    py::set_error(PyExc_TypeError, error.what());
  }
}

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
  m.attr("TRACKER_DEFAULTS") = to_dict(TrackerSettings());
  m.attr("SMALL_LIMIT") = small_limit;
  m.attr("POLL_SECONDS") = Monitor::poll_seconds;
  const py::object make = py::module_::import("enum").attr("IntEnum");
  m.attr("Count") = make("Count", names(count_names), py::arg("start") = 0);
}

py::dict describe_tables() {
  py::dict tables;
  describe<BuildInfoTable>(tables);
  describe<Objective<float>>(tables);
  describe<ObjectiveTable<float>>(tables);
  describe<Rates>(tables);
  describe<Schedule>(tables);
  describe<Run>(tables);
  describe<State<float>>(tables);
  describe<BranchSettings>(tables);
  describe<TrackerSettings>(tables);
  describe<TrackerRecord>(tables, true);
  describe<DenseTable<float>>(tables);
  describe<ReducedTable<float>>(tables);
  describe<Batch<float>>(tables);
  describe<BatchTable<float>>(tables);
  return tables;
}

}  // namespace
}  // namespace dlnfast::python

PYBIND11_MODULE(bindings, m) {
  using namespace dlnfast::python;
  m.doc() = "The compiled core of dlnfast. Use the functions of the package dlnfast instead.";
  py::register_local_exception_translator(&translate);
  export_constants(m);
  bind_products(m);
  bind_completion(m);
  bind_svd_tracker(m);
  bind_descent(m);
  m.def("describe_tables", &describe_tables,
        "{name: (included tables, {field: annotation})} of the dictionaries that functions take.");
  m.def(
      "build_info",
      [] { return to_dict(BuildInfoTable{dlnfast::build_info(), dlnfast::max_threads()}); },
      "How this module was built.");
  m.def("set_num_threads", &dlnfast::set_num_threads, py::arg("n"),
        "Default team size; 0: OpenMP's own.");
  m.def("max_threads", &dlnfast::max_threads, "Team size of a call that asks for 0 threads.");
  m.def("forbid_threads", &dlnfast::forbid_threads, "One thread from here on (in a forked child).");
}
