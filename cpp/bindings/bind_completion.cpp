// SPDX-License-Identifier: MIT
#include <pybind11/stl.h>

#include "array_view.hpp"
#include "bindings.hpp"
#include "dlnfast/completion.hpp"
#include "footprints.hpp"
#include "interrupt.hpp"
#include "observations.hpp"

namespace dlnfast::python {
namespace {

template <class T>
Index sort(const py::array& row, const py::array& col, const py::array& value, Index rows,
           Index cols, const py::array& start, const py::array& index, const py::array& values) {
  const py::array i = checked_array<std::int64_t>(row, 1, "row");
  const py::array j = checked_array<std::int64_t>(col, 1, "col");
  const py::array v = checked_array<T>(value, 1, "value");
  const Index n = i.shape(0);
  require_length(j.shape(0), n, "col");
  require_length(v.shape(0), n, "value");
  n_starts(cols, "cols");
  auto* s = records<std::int64_t>(start, n_starts(rows, "rows"), {}, "start");
  auto* to = records<std::int32_t>(index, n, {}, "index");
  auto* w = records<T>(values, n, {}, "values");
  Footprints footprints;
  footprints.reads(row, "row").reads(col, "col").reads(value, "value");
  footprints.writes(start, "start").writes(index, "index").writes(values, "values").require_apart();
  const py::gil_scoped_release release;
  return sort_entries<T>(n, static_cast<const std::int64_t*>(i.data()),
                         static_cast<const std::int64_t*>(j.data()),
                         static_cast<const T*>(v.data()), rows, cols, s, to, w);
}

template <class T>
void transpose(const py::tuple& by_rows, Index cols, const py::array& start, const py::array& index,
               const py::array& values) {
  const SparseRows<T> from = sparse_rows<T>(by_rows, cols, "by_rows");
  auto* s = records<std::int64_t>(start, n_starts(cols, "cols"), {}, "start");
  auto* to = records<std::int32_t>(index, from.size, {}, "index");
  auto* w = records<T>(values, from.size, {}, "values");
  Footprints footprints;
  footprints.reads(by_rows, "by_rows").writes(start, "start").writes(index, "index");
  footprints.writes(values, "values").require_apart();
  const py::gil_scoped_release release;
  transpose_entries<T>(from, s, to, w);
}

template <class T>
double residuals(const py::tuple& observed, const py::array& x, const py::array& y,
                 const py::object& left, const py::object& right, int n_threads) {
  const auto entries = observed_entries<T>(observed, "observed");
  const auto a = matrix<T>(x, "x"), b = matrix<T>(y, "y");
  MatrixRef<T> l, r;
  if (!left.is_none()) l = writable_matrix<T>(left, "left");
  if (!right.is_none()) r = writable_matrix<T>(right, "right");
  Footprints footprints;
  footprints.reads(observed, "observed").reads(x, "x").reads(y, "y");
  footprints.writes(left, "left").writes(right, "right").require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  check_entries(entries);
  return residual_products<T>(entries, a, b, l, r, Context{n_threads, &monitor});
}

template <class T>
double masked(const py::tuple& observed, const py::array& m, const py::array& error,
              int n_threads) {
  const auto entries = observed_entries<T>(observed, "observed");
  const auto w = matrix<T>(m, "m");
  const auto e = writable_matrix<T>(error, "error");
  Footprints().reads(observed, "observed").reads(m, "m").writes(error, "error").require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  check_entries(entries);
  return masked_residual<T>(entries.by_rows, w, e, Context{n_threads, &monitor});
}

template <class T>
double measured(const py::tuple& given, const py::array& m, const py::array& error, int n_threads) {
  const auto all = measurements<T>(given, "measurements");
  const auto w = matrix<T>(m, "m");
  const auto e = writable_matrix<T>(error, "error");
  Footprints().reads(given, "measurements").reads(m, "m").writes(error, "error").require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  return measured_residual<T>(all, w, e, Context{n_threads, &monitor});
}

}  // namespace

void bind_completion(py::module_& m) {
  m.def(
      "sort_entries",
      [](const py::array& row, const py::array& col, const py::array& value, Index rows, Index cols,
         const py::array& start, const py::array& index, const py::array& values) {
        const auto run = is_single(value) ? &sort<float> : &sort<double>;
        return run(row, col, value, rows, cols, start, index, values);
      },
      py::arg("row"), py::arg("col"), py::arg("value"), py::arg("rows"), py::arg("cols"),
      py::arg("start"), py::arg("index"), py::arg("values"),
      "Sorts entries by rows; returns the first that is outside or repeated, or -1.");
  m.def(
      "transpose_entries",
      [](const py::tuple& by_rows, Index cols, const py::array& start, const py::array& index,
         const py::array& values) {
        const auto run = is_single(values) ? &transpose<float> : &transpose<double>;
        run(by_rows, cols, start, index, values);
      },
      py::arg("by_rows"), py::arg("cols"), py::arg("start"), py::arg("index"), py::arg("values"),
      "The entries (start, index, values) column after column.");
  m.def(
      "residual_products",
      [](const py::tuple& observed, const py::array& x, const py::array& y, const py::object& left,
         const py::object& right, int n_threads) {
        const auto run = is_single(x) ? &residuals<float> : &residuals<double>;
        return run(observed, x, y, left, right, n_threads);
      },
      py::arg("observed"), py::arg("x"), py::arg("y"), py::arg("left"), py::arg("right"),
      py::arg("n_threads") = 0,
      "||E||^2 for E = Omega * (x^T y - Phi); left = y E^T and right = x E where they are given.");
  m.def(
      "masked_residual",
      [](const py::tuple& observed, const py::array& matrix, const py::array& error,
         int n_threads) {
        const auto run = is_single(matrix) ? &masked<float> : &masked<double>;
        return run(observed, matrix, error, n_threads);
      },
      py::arg("observed"), py::arg("m"), py::arg("error"), py::arg("n_threads") = 0,
      "||E||^2 for error = E = Omega * (m - Phi).");
  m.def(
      "measured_residual",
      [](const py::tuple& given, const py::array& matrix, const py::array& error, int n_threads) {
        const auto run = is_single(matrix) ? &measured<float> : &measured<double>;
        return run(given, matrix, error, n_threads);
      },
      py::arg("measurements"), py::arg("m"), py::arg("error"), py::arg("n_threads") = 0,
      "||r||^2 for r = B vec(m) - y; error = B^T r.");
}

}  // namespace dlnfast::python
