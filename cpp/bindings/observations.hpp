// Observed entries and measurements, as Python hands them over.
#pragma once

#include "array_view.hpp"
#include "dlnfast/completion.hpp"
#include "dlnfast/errors.hpp"

namespace dlnfast::python {

// From (start, index, values); as many rows as there are starts, less one.
template <class T>
SparseRows<T> sparse_rows(const py::tuple& arrays, Index cols, const std::string& name) {
  if (arrays.size() != 3) throw py::value_error(name + " is not (start, index, values)");
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
ObservedEntries<T> observed_entries(const py::tuple& orders, const std::string& name) {
  if (orders.size() != 2) throw py::value_error(name + " is not (by_rows, by_columns)");
  const auto rows = orders[0].cast<py::tuple>();
  const auto columns = orders[1].cast<py::tuple>();
  ObservedEntries<T> entries;
  entries.by_rows = sparse_rows<T>(rows, 0, name + "[0]");
  entries.by_columns = sparse_rows<T>(columns, entries.by_rows.rows, name + "[1]");
  entries.by_rows.cols = entries.by_columns.rows;
  return entries;
}

// From (operators, values).
template <class T>
Measurements<T> measurements(const py::tuple& arrays, const std::string& name) {
  if (arrays.size() != 2) throw py::value_error(name + " is not (operators, values)");
  Measurements<T> m;
  m.operators = matrix<T>(arrays[0], name + "[0]");
  const py::array values = checked_array<T>(arrays[1], 1, name + "[1]");
  require_length(values.shape(0), m.operators.rows, name + "[1]");
  m.values = static_cast<const T*>(values.data());
  return m;
}

}  // namespace dlnfast::python
