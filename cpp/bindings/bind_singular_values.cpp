// SPDX-License-Identifier: MIT
#include <pybind11/stl.h>

#include "array_view.hpp"
#include "bindings.hpp"
#include "dlnfast/singular_values.hpp"
#include "footprints.hpp"
#include "interrupt.hpp"

namespace dlnfast::python {
namespace {

template <class T>
MatrixRef<T> optional_writable(const py::object& object, const std::string& name) {
  if (object.is_none()) return {};
  return writable_matrix<T>(object, name);
}

template <class T>
void decompose(const py::array& w, const py::array& values, const py::object& left,
               const py::object& right) {
  const auto input = matrix<T>(w, "w");
  const auto s = writable_matrix<T>(values, "values");
  const auto u = optional_writable<T>(left, "left");
  const auto v = optional_writable<T>(right, "right");
  Footprints footprints;
  footprints.reads(w, "w").writes(values, "values").writes(left, "left").writes(right, "right");
  footprints.require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  singular_values<T>(input, s, u, v, Context{0, &monitor});
}

}  // namespace

void bind_singular_values(py::module_& m) {
  m.def(
      "singular_values",
      [](const py::array& w, const py::array& values, const py::object& left,
         const py::object& right) {
        const auto run = is_single(w) ? &decompose<float> : &decompose<double>;
        run(w, values, left, right);
      },
      py::arg("w"), py::arg("values"), py::arg("left"), py::arg("right"),
      "The leading singular values (1, k) of w, and their vectors as columns.");
  m.def(
      "bidiagonal_singular_values",
      [](const py::array& diagonal, const py::array& superdiagonal, Index k) {
        const py::array d = checked_array<double>(diagonal, 1, "diagonal");
        const py::array e = checked_array<double>(superdiagonal, 1, "superdiagonal");
        const auto* d_data = static_cast<const double*>(d.data());
        const auto* e_data = static_cast<const double*>(e.data());
        const std::vector<double> main(d_data, d_data + d.size());
        const std::vector<double> upper(e_data, e_data + e.size());
        // Only as many as there are; the core refuses any other k.
        const Index kept = std::min(std::max<Index>(k, 0), static_cast<Index>(main.size()));
        std::vector<double> values(static_cast<std::size_t>(kept));
        {
          const py::gil_scoped_release release;
          bidiagonal_singular_values(main, upper, values.data(), k);
        }
        return py::array_t<double>(static_cast<py::ssize_t>(values.size()), values.data());
      },
      py::arg("diagonal"), py::arg("superdiagonal"), py::arg("k"),
      "The k largest singular values of an upper bidiagonal matrix, descending.");
}

}  // namespace dlnfast::python
