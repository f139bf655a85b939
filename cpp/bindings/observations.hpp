// SPDX-License-Identifier: MIT
// Observed entries and measurements, as Python hands them over.
#pragma once

#include <limits>
#include <string>

#include "array_view.hpp"
#include "dlnfast/completion.hpp"
#include "dlnfast/errors.hpp"

namespace dlnfast::python {

// How many starts there are for so many rows or columns, as far as indices of 32 bits reach.
inline Index n_starts(Index n, const std::string& name) {
  if (n < 0 || n > std::numeric_limits<std::int32_t>::max()) {
    throw ShapeError(name + " is " + std::to_string(n) + "; wanted 0 to " +
                     std::to_string(std::numeric_limits<std::int32_t>::max()));
  }
  return n + 1;
}

// Tuples only: they keep their arrays for as long as they live themselves, which a list may not.
inline py::tuple tuple_of(py::handle object, const std::string& name, const char* wanted) {
  if (!py::isinstance<py::tuple>(object)) throw py::type_error(name + " is not " + wanted);
  return py::reinterpret_borrow<py::tuple>(object);
}

// From (start, index, values); as many rows as there are starts, less one.
template <class T>
SparseRows<T> sparse_rows(py::handle object, Index cols, const std::string& name) {
  constexpr const char* wanted = "(start, index, values)";
  const py::tuple arrays = tuple_of(object, name, wanted);
  if (arrays.size() != 3) throw py::value_error(name + " is not " + wanted);
  const py::array start = checked_array<std::int64_t>(arrays[0], 1, name + "[0]");
  const py::array index = checked_array<std::int32_t>(arrays[1], 1, name + "[1]");
  const py::array values = checked_array<T>(arrays[2], 1, name + "[2]");
  if (start.shape(0) < 1) throw py::value_error(name + "[0] is empty");
  require_length(values.shape(0), index.shape(0), name + "[2]");
  SparseRows<T> s;
  s.rows = start.shape(0) - 1;
  s.cols = cols;
  s.size = index.shape(0);
  s.start = static_cast<const std::int64_t*>(start.data());
  s.index = static_cast<const std::int32_t*>(index.data());
  s.values = static_cast<const T*>(values.data());
  return s;
}

// From (by_rows, by_columns).
template <class T>
ObservedEntries<T> observed_entries(py::handle object, const std::string& name) {
  constexpr const char* wanted = "(by_rows, by_columns)";
  const py::tuple orders = tuple_of(object, name, wanted);
  if (orders.size() != 2) throw py::value_error(name + " is not " + wanted);
  ObservedEntries<T> entries;
  entries.by_rows = sparse_rows<T>(orders[0], 0, name + "[0]");
  entries.by_columns = sparse_rows<T>(orders[1], entries.by_rows.rows, name + "[1]");
  entries.by_rows.cols = entries.by_columns.rows;
  return entries;
}

// From (operators, values).
template <class T>
Measurements<T> measurements(py::handle object, const std::string& name) {
  constexpr const char* wanted = "(operators, values)";
  const py::tuple arrays = tuple_of(object, name, wanted);
  if (arrays.size() != 2) throw py::value_error(name + " is not " + wanted);
  Measurements<T> m;
  m.operators = matrix<T>(arrays[0], name + "[0]");
  const py::array values = checked_array<T>(arrays[1], 1, name + "[1]");
  require_length(values.shape(0), m.operators.rows, name + "[1]");
  m.values = static_cast<const T*>(values.data());
  return m;
}

}  // namespace dlnfast::python
