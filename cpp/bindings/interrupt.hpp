// SPDX-License-Identifier: MIT
// How a long call polls Python: signals, callbacks, progress.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "dlnfast/monitor.hpp"

namespace dlnfast::python {

namespace py = pybind11;

// Python's signal handlers run here; their exceptions pass through the core unchanged.
inline void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// A monitor that only lets Ctrl-C through.
inline Monitor listening() {
  return Monitor([](Index, double, bool) {
    const py::gil_scoped_acquire acquire;
    check_signals();
    return Answer::go_on;
  });
}

// Whether an answer is Python's or NumPy's True; anything else that a callable returns is ignored.
inline bool is_true(const py::object& answer) {
  if (answer.ptr() == Py_True) return true;
  const std::string type = Py_TYPE(answer.ptr())->tp_name;
  return (type == "numpy.bool" || type == "numpy.bool_") && PyObject_IsTrue(answer.ptr()) == 1;
}

// A monitor that also calls on_record(step, loss) at records (True stops the run), on_progress(step,
// loss) from time to time, and on_flush(step) when records are to be taken away. Each may be None.
inline Monitor reporting(const py::object& on_record, const py::object& on_progress,
                         const py::object& on_flush) {
  const bool records = !on_record.is_none();
  const bool progress = !on_progress.is_none();
  // The objects outlive the call that holds them; handles need no GIL to be copied.
  const py::handle record_handle = on_record;
  const py::handle progress_handle = on_progress;
  const py::handle flush_handle = on_flush;
  Monitor::Flush flush;
  if (!on_flush.is_none()) {
    flush = [=](Index step) {
      const py::gil_scoped_acquire acquire;
      check_signals();
      flush_handle(step);
    };
  }
  const auto ask = [=](Index step, double loss, bool at_record) {
    if (at_record && !records) return Answer::go_on;
    const py::gil_scoped_acquire acquire;
    check_signals();
    if (at_record) {
      const py::object answer = record_handle(step, loss);
      return is_true(answer) ? Answer::stop : Answer::go_on;
    }
    if (progress) progress_handle(step, loss);
    return Answer::go_on;
  };
  return Monitor(ask, flush);
}

}  // namespace dlnfast::python
