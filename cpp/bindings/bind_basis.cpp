// SPDX-License-Identifier: MIT
#include "array_view.hpp"
#include "bindings.hpp"
#include "dlnfast/basis.hpp"
#include "footprints.hpp"
#include "interrupt.hpp"

namespace dlnfast::python {
namespace {

template <class T>
Index extend(const py::array& basis, Index n_basis, const py::array& block, double tolerance,
             const py::array& lengths, int n_threads) {
  const auto rows = writable_matrix<T>(basis, "basis");
  const auto extra = writable_matrix<T>(block, "block");
  auto* out = records<double>(lengths, extra.rows, {}, "lengths");
  Footprints()
      .writes(basis, "basis")
      .writes(block, "block")
      .writes(lengths, "lengths")
      .require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  return extend_basis<T>(rows, n_basis, extra, tolerance, out, Context{n_threads, &monitor});
}

}  // namespace

void bind_basis(py::module_& m) {
  m.def(
      "extend_basis",
      [](const py::array& basis, Index n_basis, const py::array& block, double tolerance,
         const py::array& lengths, int n_threads) {
        const auto run = is_single(basis) ? &extend<float> : &extend<double>;
        return run(basis, n_basis, block, tolerance, lengths, n_threads);
      },
      py::arg("basis"), py::arg("n_basis"), py::arg("block"), py::arg("tolerance"),
      py::arg("lengths"), py::arg("n_threads") = 0,
      "Appends to the first n_basis rows of basis what block has outside; returns how many rows.");
}

}  // namespace dlnfast::python
