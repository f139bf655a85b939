// SPDX-License-Identifier: MIT
// A call from Python: how it polls Python while it runs (signals, callbacks, progress), and its NumPy arrays
// as views for the core: checked, never copied, and apart from each other where one is written.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "dlnfast/array.hpp"
#include "dlnfast/monitor.hpp"

namespace dlnfast::python {

namespace py = pybind11;

// Python's signal handlers run here; their exceptions pass through the core unchanged.
inline void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Whether an answer is Python's or NumPy's True; anything else that a callable returns is ignored.
inline bool is_true(const py::object& answer) {
  py::detail::make_caster<bool> caster;
  return caster.load(answer, false) && static_cast<bool>(caster);
}

// A monitor that lets Ctrl-C through, and calls on_record(step, loss) at records (True stops the run),
// on_progress(step, loss) from time to time, and on_flush(step) when records are to be taken away. Each may
// be None. The objects must outlive the monitor, which copies them without the GIL: as handles.
inline Monitor make_monitor(py::handle on_record = Py_None, py::handle on_progress = Py_None,
                            py::handle on_flush = Py_None) {
  Monitor::Flush flush;
  if (!on_flush.is_none()) {
    flush = [on_flush](Index step) {
      const py::gil_scoped_acquire acquire;
      check_signals();
      on_flush(step);
    };
  }
  const auto ask = [on_record, on_progress](Index step, double loss, bool at_record) {
    if (at_record && on_record.is_none()) return Answer::go_on;
    const py::gil_scoped_acquire acquire;
    check_signals();
    if (at_record) return is_true(on_record(step, loss)) ? Answer::stop : Answer::go_on;
    if (!on_progress.is_none()) on_progress(step, loss);
    return Answer::go_on;
  };
  return Monitor(ask, flush);
}

// One call from Python: its monitor, and its arrays. It keeps a reference to each of them, as callbacks may
// empty the caller's containers.
class Call {
 public:
  Monitor monitor = make_monitor();

  Call() { spans_.reserve(8); }

  // A C-contiguous, aligned array of T, or an error that names the argument.
  template <class T, int n>
  ArrayRef<T, n> view(py::handle object, const std::string& name) {
    using Item = std::remove_const_t<T>;
    if (!py::isinstance<py::array>(object)) throw py::type_error(name + " is not a NumPy array");
    auto array = py::reinterpret_borrow<py::array>(object);
    if (!py::isinstance<py::array_t<Item>>(array)) {
      throw py::type_error(name + " has dtype " + std::string(py::str(array.dtype())) +
                           "; wanted " + std::string(py::str(py::dtype::of<Item>())));
    }
    if (array.ndim() != n) {
      throw py::value_error(name + " has " + std::to_string(array.ndim()) + " axes; wanted " +
                            std::to_string(n));
    }
    if ((array.flags() & py::array::c_style) == 0) {
      throw py::type_error(name + " is not C-contiguous");
    }
    if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
      throw py::type_error(name + " is not aligned");
    }
    if (!std::is_const_v<T> && !array.writeable()) throw py::value_error(name + " is read-only");
    ArrayRef<T, n> view{static_cast<T*>(const_cast<void*>(array.data())), {}};
    std::copy(array.shape(), array.shape() + n, view.shape.begin());
    const auto* begin = static_cast<const char*>(array.data());
    spans_.push_back({begin, begin + array.nbytes(), !std::is_const_v<T>, name, std::move(array)});
    return view;
  }

  // Indices, counts and pieces of work are checked once and then trusted: what a call writes may share
  // memory with nothing else that it uses.
  void require_apart() {
    std::sort(spans_.begin(), spans_.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span *last = nullptr, *last_written = nullptr;  // those that reach furthest so far
    for (const Span& span : spans_) {
      if (span.begin == span.end) continue;
      const Span* before = span.written ? last : last_written;
      if (before != nullptr && before->end > span.begin) {
        throw py::value_error(before->name + " and " + span.name +
                              " share memory; wanted arrays apart from those written");
      }
      if (last == nullptr || span.end > last->end) last = &span;
      if (span.written && (last_written == nullptr || span.end > last_written->end)) {
        last_written = &span;
      }
    }
  }

 private:
  struct Span {
    const char *begin, *end;
    bool written;
    std::string name;
    py::array held;
  };

  std::vector<Span> spans_;
};

}  // namespace dlnfast::python
