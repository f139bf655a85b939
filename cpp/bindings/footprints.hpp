// SPDX-License-Identifier: MIT
// Where the arrays of a call lie. Indices, counts and pieces of work are checked once and then trusted,
// so what a call writes may share memory with nothing else that it uses.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <string>
#include <vector>

namespace dlnfast::python {

class Footprints {
 public:
  // An array, or a tuple or list of what holds arrays; anything else has no footprint.
  Footprints& reads(pybind11::handle object, const std::string& name) {
    add(object, name, false);
    return *this;
  }
  Footprints& writes(pybind11::handle object, const std::string& name) {
    add(object, name, true);
    return *this;
  }

  // To be called once all arrays are known to be contiguous.
  void require_apart() {
    std::sort(spans_.begin(), spans_.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span *last = nullptr, *last_written = nullptr;  // that reach furthest so far
    for (const Span& span : spans_) {
      const Span* before = span.written ? last : last_written;
      if (before != nullptr && before->end > span.begin) {
        throw pybind11::value_error(before->name + " and " + span.name +
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
    const char* begin;
    const char* end;
    bool written;
    std::string name;
  };

  void add(pybind11::handle object, const std::string& name, bool written) {
    namespace py = pybind11;
    if (py::isinstance<py::array>(object)) {
      const auto array = py::reinterpret_borrow<py::array>(object);
      const auto* begin = static_cast<const char*>(array.data());
      if (array.nbytes() > 0) spans_.push_back({begin, begin + array.nbytes(), written, name});
    } else if (py::isinstance<py::tuple>(object) || py::isinstance<py::list>(object)) {
      py::size_t i = 0;
      for (const py::handle item : object)
        add(item, name + "[" + std::to_string(i++) + "]", written);
    }
  }

  std::vector<Span> spans_;
};

}  // namespace dlnfast::python
